"""What the families of benchmarks share, beside `coalescer_fast.bench`, which has timing, peers and the environment.

- `arguments`: command lines, and how a user's mistake is reported
- `results`: rows, and the CSV files that hold them
- `refcheck`: when a result is right
- `int8`: peers in 8 bits
- `profile`: the steps of native programs
- `tables`: aligned text tables
"""
