"""``rlrr-finetune``: fine-tune an image classifier, and use the result."""

from __future__ import annotations

import argparse
import difflib
import sys

from rlrr_kernels.finetune.commands import evaluate, export, merge, sweep, table, train
from rlrr_kernels.finetune.commands.common import INTERRUPTED, CommandError, as_options
from rlrr_kernels.finetune.distributed import launched

#: Commands by name. ``train`` runs if none is named.
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
    """Build the parser of one command."""
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
        # in a sweep --lr would abbreviate --lrs
        allow_abbrev=name == DEFAULT,
    )
    command.add_arguments(result)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run a command. The exit status is 0 for success, 1 for failed work, 2 for bad arguments, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    name, options = DEFAULT, words
    if words and not words[0].startswith("-"):
        name, options = words[0], words[1:]
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
            _fail(f"unknown command {name!r}; {hint}", 2)
    command, of_command = COMMANDS[name], parser(name)
    arguments = of_command.parse_args(options)
    try:
        if launched().size > 1 and not command.multiprocess:
            raise CommandError(f"{name} runs in one process, not in {launched().size}", 2)
        return command.run(arguments)
    except (CommandError, ValueError, FloatingPointError, OSError, RuntimeError) as error:
        status = error.status if isinstance(error, CommandError) else 1
        _fail(as_options(str(error), of_command, options), status)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    return 0


def _fail(message: str, status: int) -> None:
    world = launched()
    where = f" (process {world.rank} of {world.size})" if world.size > 1 else ""
    print(f"rlrr-finetune: error{where}: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    raise SystemExit(main())
