"""The first day on a GPU, in stages that each fit ten minutes: ``python -m benchmarks.first_day STAGE...``."""
