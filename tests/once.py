"""What is costly to make and serves all of pytest-xdist's workers: made once a session, by the first that asks."""

import os

from filelock import FileLock


def once(tmp_path_factory, name, make):
    """The folder of this name that ``make(folder)`` has filled."""
    base = tmp_path_factory.getbasetemp()
    # each worker has a folder of its own, below one that they share
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder
