"""Measurements: speed, kernels, serving load. Results are appended to `bench/results/` as JSON lines."""
