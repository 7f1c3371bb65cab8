"""A network becomes ONNX: as modules of plain tensors, as a graph, as an artefact."""
