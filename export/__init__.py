"""From a pipeline to files that are deployed: `coalescer-export`, or ``python -m coalescer_fast.export``.

The part of the package for build time. It imports the runtime and is never imported by it: what it writes,
`coalescer_fast.runtime.engines` reads.

- onnx: a network becomes ONNX.
- quantize: a float artefact becomes int8.
- engine: an artefact in ONNX becomes an engine of TensorRT or TensorRT-RTX.
- measure: how far an artefact is from the float32 reference, and how fast it is.
- commands: the subcommands, a module each.

Modules import coalescer_fast by its full name, because in the repository this folder stands beside it, where
``python -m export`` runs too.
"""
