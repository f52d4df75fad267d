"""``python -m rlrr_kernels check``: whether each backend computes what it should on this device.

``cases.py`` says what is computed and judges it by ``yardstick.py``, ``worker.py`` does so for one pass in a process of
its own, ``processes.py`` runs these processes under a time limit, and ``command.py`` is the command. The results are
kept by :mod:`rlrr_kernels.backends.verdicts`.
"""
