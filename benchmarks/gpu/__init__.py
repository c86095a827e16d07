"""The GPU's benchmark: `python -m benchmarks.gpu --help` teaches."""
