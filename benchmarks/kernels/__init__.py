"""The four ops, backend beside backend and against plain torch."""
