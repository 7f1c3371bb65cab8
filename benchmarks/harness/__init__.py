"""What the families of benchmarks share.

- `arguments`: command lines, and how a user's mistake is reported
- `timing`: timers for the CPU and for GPUs, measurements taken in turn
- `results`: rows, and the CSV files that hold them
- `environment`: what a row says of the machine and of versions
- `peers`: registration of what ours is compared with
- `refcheck`: when a result is right
- `int8`: peers in 8 bits
- `tables`: aligned text tables
"""
