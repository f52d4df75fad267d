"""Loads the shared libraries that ``setup.py`` builds from ``csrc/``."""

from __future__ import annotations

from pathlib import Path

import torch

FOLDER = Path(__file__).parent.parent / "lib"


def load(name: str, builder: str) -> None:
    """Load ``librlrr_<name>.so``, which registers the ops of the namespace ``rlrr_<name>``.

    Args:
        name: Name of the library.
        builder: What the build needs, for the error.

    Raises:
        ImportError: If the library is missing, or this torch cannot load it. The message says how to build it.
    """
    path = FOLDER / f"librlrr_{name}.so"
    remedy = "reinstall from the source folder: pip install --force-reinstall --no-deps ."
    if not path.exists():
        raise ImportError(f"{path.name} is not in {FOLDER}: it was not built. With {builder}, {remedy}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # torch's own error only names the file; its cause, from the loader, says what is wrong
        why = error.__cause__ or error
        raise ImportError(f"{path.name} does not load with torch {torch.__version__} ({why}); {remedy}") from error
