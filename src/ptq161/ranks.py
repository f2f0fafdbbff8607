"""Several processes that do one job together, as `torchrun` starts them. In a process alone all of this does nothing.

Every rank runs the same code on its own share of the samples: those whose index is its number, modulo the ranks. What
is summed over samples is summed over ranks, after which all ranks know the same and decide the same; rank 0 alone
writes and speaks. A rank that fails ends its process, and torchrun ends the others.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as torch_distributed

from ptq161.errors import FailedElsewhere, InputError, Ptq161Error

# How long ranks wait for each other: rank 0 alone reads and writes whole models.
PATIENCE = timedelta(hours=2)

_Made = TypeVar("_Made")


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started are ranks of one job: over gloo, and nccl for tensors on GPUs.

    device: as `machine.pick_device` takes it; each rank gets a GPU of its own. Raises InputError if there are too few.
    """
    if not torch_distributed.is_torchelastic_launched():
        yield
        return
    on_gpus = torch.cuda.is_available() and device != "cpu"
    if on_gpus:
        number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= gpus:
            raise InputError(f"rank {number} of this machine has no GPU, of {gpus}: start {gpus}, or give --device cpu")
        torch.cuda.set_device(number)
    torch_distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
    yield
    torch_distributed.destroy_process_group()  # not after a failure, when it might wait for ranks that are gone


def count() -> int:
    """How many ranks there are: 1 in a process alone."""
    return torch_distributed.get_world_size() if torch_distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return torch_distributed.get_rank() if torch_distributed.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def count_here() -> int:
    """How many ranks share this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if count() > 1 else 1


def share(samples: Tensor) -> Tensor:
    """This rank's part of (samples, ...): every `count()`-th, from its own number on."""
    return samples[rank() :: count()]


def own(indices: Iterable[int]) -> list[int]:
    """Which of these samples are this rank's, as positions in its share."""
    return [index // count() for index in indices if index % count() == rank()]


def add(*tensors: Tensor) -> None:
    """Sum each tensor over the ranks, in place."""
    if count() > 1:
        for tensor in tensors:
            with _contact():
                torch_distributed.all_reduce(tensor)


def greatest(tensor: Tensor) -> None:
    """Take the maximum over the ranks, element by element, in place."""
    if count() > 1:
        with _contact():
            torch_distributed.all_reduce(tensor, torch_distributed.ReduceOp.MAX)


def total(*numbers: float) -> tuple[float, ...]:
    """The sum of each number over the ranks, in float64."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    add(sums)
    return tuple(sums.tolist())


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients over the ranks, in place; those of a rank without samples in this step count as zero."""
    if count() > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            add(parameter.grad)


def from_first(make: Callable[[], _Made]) -> _Made:
    """What `make` gives on rank 0, where alone it is called, on every rank.

    Where it raises, the other ranks raise FailedElsewhere.
    """
    if not first():
        made: _Made = _hear()
        return made
    with _failure_told():
        value = make()
    _tell((value,))
    return value


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Inside, rank 0 is done before the others begin: they find what it fetched, and do not repeat how it failed.

    Where it raises, the other ranks raise FailedElsewhere.
    """
    if not first():
        _hear()
        yield
        return
    with _failure_told():
        yield
    _tell((None,))


def gathered(value: _Made) -> list[_Made]:
    """The value of every rank, on every rank."""
    values: list[Any] = [value] * count()
    if count() > 1:
        with _contact():
            torch_distributed.all_gather_object(values, value)
    return values


def check_same(what: str, value: str) -> None:
    """Raises Ptq161Error unless all ranks have the same value, which their hardware or software may bring about."""
    values = gathered(value)
    if len(set(values)) > 1:
        other = next(number for number, theirs in enumerate(values) if theirs != values[0])
        raise Ptq161Error(
            f"{what} differ between ranks 0 and {other}: ranks need the same kind of processor, GPU and software; "
            "finished blocks are kept"
        )


@contextmanager
def lost_ranks_reported() -> Iterator[None]:
    """Around a library that talks to the other ranks itself: Ptq161Error when one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch_distributed.DistError) and "gloo" not in str(error):
            raise
        raise _lost(error) from error


def _tell(box: tuple[Any] | None) -> None:
    """From rank 0 to all others, which `_hear`: a value, or None for a failure."""
    if count() > 1:
        with _contact():
            torch_distributed.broadcast_object_list([box])


def _hear() -> Any:
    box: list[Any] = [None]
    with _contact():
        torch_distributed.broadcast_object_list(box)
    if box[0] is None:
        raise FailedElsewhere("rank 0 failed")
    return box[0][0]


@contextmanager
def _failure_told() -> Iterator[None]:
    """Lets the ranks that wait for rank 0 know that it fails."""
    try:
        yield
    except BaseException:
        with suppress(Ptq161Error):
            _tell(None)
        raise


@contextmanager
def _contact() -> Iterator[None]:
    """Turns what torch raises when a rank is gone into one line."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from error


def _lost(error: RuntimeError) -> Ptq161Error:
    return Ptq161Error(
        f"lost contact with another rank ({error}); what was finished is kept, give the same command again"
    )
