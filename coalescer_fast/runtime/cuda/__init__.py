"""A pipeline on a CUDA device, its calls captured as CUDA graphs."""
