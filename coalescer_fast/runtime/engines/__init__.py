"""A pipeline's networks run by compilers and inference engines, from the pipeline itself or from exported artefacts."""
