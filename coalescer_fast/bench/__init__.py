"""The command ``coalescer-fast bench``, and how it measures; the benchmarks of the repository measure by the same.

- `timing`: timers for the CPU and for GPUs, measurements taken in turn
- `peers`: registration of what ours is compared with, and attempts that may fail or run out of time
- `environment`: what a row says of the machine and of versions
- `errors`: how far results are from the reference
- `calls`: calls of diffusers' UNets, for whatever runs them
- `engines`: what runs a pipeline or a UNet
- `report`: the measurements as a table and as JSON
- `command`: the command
"""

Row = dict[str, float | int | str]  # what is known of a measurement, by column
