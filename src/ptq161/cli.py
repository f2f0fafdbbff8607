"""The command line: parses arguments, runs the command, and says in one line why it failed.

Results go to stdout (one JSON object with --json), everything else to stderr. Heavy imports live inside the bodies of
commands, so that `--help` and a mistyped argument answer at once. Exit codes: 0 done, 1 failed while running, 2 bad
arguments or input, 130 interrupted.
"""

import os
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

from ptq161.arguments import parse
from ptq161.commands.common import fail, torchrun_rank
from ptq161.commands.evaluating import compare_command, eval_command, report_command
from ptq161.commands.looking import bench_command, inspect_command, verify_command
from ptq161.commands.making import preprocess_command, quantize_command
from ptq161.commands.writing import chat_command, generate_command, serve_command
from ptq161.errors import FailedElsewhere, InputError, Ptq161Error

# What an interruption leaves, by command.
KEPT = {
    "quantize": "; finished blocks are kept, the same command continues",
    "compare": "; finished rows are kept, the same command continues",
    "preprocess": "; what was done is kept (training: up to its last checkpoint), the same command continues",
}
COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "quantize": quantize_command,
    "preprocess": preprocess_command,
    "eval": eval_command,
    "compare": compare_command,
    "report": report_command,
    "inspect": inspect_command,
    "verify": verify_command,
    "generate": generate_command,
    "chat": chat_command,
    "serve": serve_command,
    "bench": bench_command,
}
SHARED = ("quantize", "preprocess", "eval")  # what several processes can do together


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; on failure the last line on stderr says why."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse(arguments)
        if torchrun_rank() is not None and args.command not in SHARED:
            raise InputError(f"torchrun can run {', '.join(SHARED)}; start {args.command} without it")
        if torchrun_rank() == 0:
            signal.signal(signal.SIGTERM, partial(_ended, KEPT.get(args.command, "")))
        status = COMMANDS[args.command](args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except FailedElsewhere as error:
        return error.exit_code
    except Exception as error:
        _debug(arguments)
        if _from_interrupt(error):
            return _interrupted(arguments)
        if isinstance(error, Ptq161Error):
            return fail(str(error), error.exit_code)
        hint = "" if "--debug" in arguments else " (--debug shows where)"
        return fail(f"{type(error).__name__}: {error}{hint}", 1)


def _interrupted(arguments: Sequence[str]) -> int:
    kept = "".join(KEPT.get(command, "") for command in arguments[:1])
    return 130 if torchrun_rank() else fail(f"interrupted{kept}", 130)


def _from_interrupt(error: BaseException | None) -> bool:
    """Whether this came of a KeyboardInterrupt, of which C code that does not expect it makes a SystemError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _ended(kept: str, *_: object) -> None:
    """Says why rank 0 stops when torchrun ends it, which it does as soon as another rank has failed."""
    os._exit(fail(f"ended by torchrun, because another rank failed{kept}", 1))


def _debug(arguments: Sequence[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()
