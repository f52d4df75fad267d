"""A lock that a process holds until it ends, which shows a test whether it still runs."""

import time

from filelock import FileLock, Timeout


def holding(lock):
    """Code that takes the lock; the end of its process releases it."""
    return f"import fcntl, time\nheld = open({str(lock)!r}, 'w')\nfcntl.flock(held, fcntl.LOCK_EX)\n"


def wait_until_held(lock, seconds=120):
    deadline = time.monotonic() + seconds
    while not (lock.exists() and is_held(lock)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_held(lock):
    try:
        FileLock(lock).acquire(timeout=0).lock.release()
    except Timeout:
        return True
    return False


def wait_until_free(lock, seconds=120):
    FileLock(lock).acquire(timeout=seconds).lock.release()
