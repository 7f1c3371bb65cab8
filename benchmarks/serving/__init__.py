"""coalescer-fast serve under load."""
