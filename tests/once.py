"""What is costly to make is made once in a session, by the first worker of pytest-xdist that needs it."""

import os

from filelock import FileLock


def once(tmp_path_factory, name, make):
    """The folder with this name, which the first caller fills by ``make(folder)``."""
    base = tmp_path_factory.getbasetemp()
    # each worker's folder lies in one that they share
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder
