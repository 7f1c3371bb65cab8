"""A float artefact becomes int8: ranges by calibration, QuantizeLinear and DequantizeLinear nodes, and what that costs."""
