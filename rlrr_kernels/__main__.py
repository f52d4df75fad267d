"""``python -m rlrr_kernels``: what is here, and whether it is right on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlrr_kernels import info
from rlrr_kernels.check import cli as check


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m rlrr_kernels", description="Fused kernels: what is here, and is it right?"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check.add_options(
        commands.add_parser("check", help="is each backend right on this machine?", description=check.DESCRIPTION)
    )
    commands.add_parser("info", help="versions, what is built, and which backend serves what")
    given = parser.parse_args(arguments)
    if given.command == "check":
        return check.main(given)
    info.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
