"""Exported graphs: int8 beside the float32 that it was made of."""
