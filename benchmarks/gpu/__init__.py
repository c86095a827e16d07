"""GPU kernels side by side, on one card at a time."""
