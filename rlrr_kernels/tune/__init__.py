"""``rlrr-tune``: measure the Triton kernels' tiles on this GPU and keep what beats the heuristic.

The launcher reads the result through :mod:`rlrr_kernels.backends.triton.tuned`; it never measures by itself.
"""
