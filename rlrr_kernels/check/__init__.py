"""``python -m rlrr_kernels check``: whether each backend computes what it should on this very device.

``cases.py`` says what is computed and judges it, ``worker.py`` does so for one pass in a process of its own,
``processes.py`` runs those processes under a time limit, ``record.py`` keeps what was found, and ``cli.py`` is the
command.
"""
