"""``rlrr-finetune``: fine-tune an image classifier from the command line, and use what came of it."""

from __future__ import annotations

import argparse
import difflib
import sys

from rlrr_kernels.finetune.commands import evaluate, export, merge, sweep, table, train
from rlrr_kernels.finetune.commands.common import INTERRUPTED, CommandError
from rlrr_kernels.finetune.commands.options import as_options
from rlrr_kernels.finetune.distributed import launched

#: Name -> what it does. ``train`` runs if none is named.
COMMANDS = {
    "train": train.COMMAND,
    "sweep": sweep.COMMAND,
    "eval": evaluate.COMMAND,
    "merge": merge.COMMAND,
    "export": export.COMMAND,
    "table": table.COMMAND,
}
DEFAULT = "train"


def parser(name: str = DEFAULT) -> argparse.ArgumentParser:
    """The options of one command."""
    command = COMMANDS[name]
    epilog = None
    if name == DEFAULT:
        lines = [f"  {other:<8}{entry.summary}" for other, entry in COMMANDS.items()]
        epilog = "\n".join(["commands:", *lines, "", "rlrr-finetune COMMAND --help tells the options of each."])
    result = argparse.ArgumentParser(
        prog="rlrr-finetune" if name == DEFAULT else f"rlrr-finetune {name}",
        description=command.description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # in a sweep --lr would stand for --lrs
        allow_abbrev=name == DEFAULT,
    )
    command.add_arguments(result)
    return result


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the work failed, 2 bad arguments, 130 stopped by Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    name, options = DEFAULT, words
    if words and not words[0].startswith("-"):
        name, options = words[0], words[1:]
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
            _fail(f"unknown command {name!r}; {hint}", 2)
    command = COMMANDS[name]
    of_command = parser(name)
    arguments = of_command.parse_args(options)
    try:
        if launched().size > 1 and not command.several:
            raise CommandError(f"{name} runs in one process, not in {launched().size}", 2)
        return command.run(arguments)
    except CommandError as error:
        _fail(as_options(str(error), of_command, options), error.status)
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        _fail(as_options(str(error), of_command, options), 1)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    return 0


def _fail(message: str, status: int) -> None:
    world = launched()
    # each process may have its own reason
    where = f" (process {world.rank} of {world.size})" if world.size > 1 else ""
    print(f"rlrr-finetune: error{where}: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    raise SystemExit(main())
