"""The kernels: each backend computes the passes of the two ops, and ``choice`` says which of them serves which call."""
