"""Benchmarks: speed and memory of the layer against other ways to compute the same function."""
