"""coalescer-fast generate: CPU time of a picture, and how long a file of a million prompts takes to read."""
