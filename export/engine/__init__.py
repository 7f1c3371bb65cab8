"""An artefact in ONNX becomes an engine of TensorRT or TensorRT-RTX."""
