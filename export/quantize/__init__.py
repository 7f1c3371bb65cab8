"""A float artefact becomes int8: which layers, their ranges, and where the Q/DQ nodes are placed."""
