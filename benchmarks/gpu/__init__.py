"""All that can be checked and measured on a CUDA machine, by one command."""
