"""Benchmarks of the ops, side by side with what they replace: `make bench`, or `python -m keeprate_kernels.bench`.

`races` says what is timed against what, `naive` holds the plain code it is timed against, `clock` takes time and
memory, `machine` measures what the device can do, `record` makes rows, `bars` holds them against the acceptance bars,
`report` writes kernels/bench/<device>.csv and kernels/BENCHMARKS.md. Nothing here needs more than torch and numpy.
"""
