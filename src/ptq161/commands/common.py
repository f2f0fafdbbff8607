"""What commands have in common: how they print, fail, open a model, and know which of several processes they are."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ptq161.errors import InputError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def torchrun_rank() -> int | None:
    """The number of this process among those that torchrun started; None without torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def fail(message: str, status: int) -> int:
    """Say on stderr, in one line, why the command failed; returns its exit code."""
    where = f"rank {torchrun_rank()}: " if torchrun_rank() else ""
    print(f"ptq161: error: {where}{' '.join(message.split())}", file=sys.stderr)
    return status


def show_result(args: Namespace, result: Mapping[str, Any], show: Callable[["Console"], None]) -> int:
    """Print a result on stdout, as JSON or through `show`, and return the exit code of success; rank 0 alone does."""
    from ptq161 import terminal

    if torchrun_rank():
        return 0
    if args.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        show(terminal.console())
    return 0


def dtype_of(args: Namespace) -> "torch.dtype | None":
    """What --dtype names; None for auto."""
    import torch

    return None if args.dtype == "auto" else getattr(torch, args.dtype)


def opened_model(args: Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model of a command and its tokenizer, kept and computed as the options say."""
    from ptq161 import machine, sources

    device = machine.pick_device(args.device)
    return sources.open_model(
        args.path, device=device, dtype=dtype_of(args), mode=args.mode, activations=args.activations
    )


def require(extra: str, *modules: str) -> None:
    """Raises InputError if one of the modules that an extra brings is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(f'this command needs {", ".join(missing)}: pip install "ptq161[{extra}]"')
