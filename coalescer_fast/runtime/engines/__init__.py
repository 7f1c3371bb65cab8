"""A pipeline's networks by compilers and inference engines: prepared here for each shape, or exported beforehand."""
