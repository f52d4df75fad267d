"""``rlrr-tune``: measures every backend and tile for given layers on this device, and keeps the fastest.

``auto`` and the launchers read the result through :mod:`rlrr_kernels.backends.tuned`; only this command measures.
"""
