"""``rlrr-tune``: measure every backend and tile for given layers on this device, and keep what is fastest.

``auto`` and the launchers read the result through :mod:`rlrr_kernels.backends.tuned`; nothing else ever measures.
"""
