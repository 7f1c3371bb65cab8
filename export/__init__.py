"""From a pipeline to files that are deployed: `coalescer-export`, or ``python -m coalescer_fast.export``.

The build-time half of the package. It imports the runtime and is never imported by it: what it writes, `coalescer_fast.runtime.engines.artefact`
reads. Modules import coalescer_fast absolutely, for the folder stands beside it in the repository (``python -m export`` runs there, too).
"""
