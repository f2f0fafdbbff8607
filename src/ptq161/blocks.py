"""One decoder block at work: how it is called, what enters and leaves it, what its linears see.

`BlockTask` is all that a method may know of a model. No family is named here: calls are recorded by `discovery` from
the model's own forward pass and replayed one sample at a time.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ptq161 import ranks
from ptq161.errors import NonFiniteError, UnsupportedModel
from ptq161.space import MEMORY, Space


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block: everything but the hidden states, as recorded for a single sample.

    returns: how many things the block returns in a tuple, the hidden states first; 0 for the hidden states alone.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returns: int = 0

    def __call__(
        self,
        block: nn.Module,
        hidden: Float[Tensor, "1 seq hidden"],
        weights: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "1 seq hidden"]:
        """Run the block on one sample, with some of its parameters replaced by `weights` (name -> tensor)."""
        args = (hidden, *self.args)
        if weights is None:
            output = block(*args, **self.kwargs)
        else:
            output = torch.func.functional_call(block, dict(weights), args, self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def to(self, device: torch.device) -> "BlockCall":
        """A copy with its tensors on `device`."""
        return BlockCall(tensors_to(self.args, device), tensors_to(self.kwargs, device), self.returns)

    def returned(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which the block returns them, nothing beside them."""
        return (hidden, *[None] * (self.returns - 1)) if self.returns else hidden


@dataclass
class InputStats:
    """Running per-channel statistics of one linear's input: (cols,) each, over `tokens` tokens."""

    absmax: Float[Tensor, " cols"]
    abs_sum: Float[Tensor, " cols"]
    square_sum: Float[Tensor, " cols"]
    tokens: int = 0

    @classmethod
    def empty(cls, cols: int, device: torch.device) -> "InputStats":
        """Statistics of no tokens at all."""
        return cls(*torch.zeros(3, cols, device=device))

    def update(self, inputs: Float[Tensor, "*batch cols"]) -> None:
        """Take in the inputs of one call."""
        magnitude = inputs.detach().float().abs().flatten(0, -2)
        self.absmax = torch.maximum(self.absmax, magnitude.amax(dim=0))
        self.abs_sum += magnitude.sum(dim=0)
        self.square_sum += magnitude.square().sum(dim=0)
        self.tokens += magnitude.shape[0]

    def combine(self) -> None:
        """Take in what the other ranks have seen."""
        ranks.greatest(self.absmax)
        ranks.add(self.abs_sum, self.square_sum)
        self.tokens = int(ranks.total(self.tokens)[0])


@dataclass(frozen=True)
class BlockTask:
    """All that a method may see of one decoder block. Streams are float32 (samples, seq, hidden), this rank's share.

    linears: name inside the block -> module, in order of definition.
    columns_from: linear -> earlier linear that sees the same input, where there is one.
    full_in: the full-precision stream into the block (X of Eq. 7); None where the method does not ask for it.
    quantized_in: the quantized stream into the block (X_q of Eq. 7).
    full_out: the original block on the full-precision stream, F(X, W).
    local_out: the original block on the quantized stream, F(X_q, W).
    stats: input statistics of each linear over the full-precision stream, of all ranks.
    widths: linear -> code width and number of channels of each of its column groups, as the budget has it.
    space: where the method's own stream goes.
    """

    index: int
    block: nn.Module
    linears: dict[str, nn.Linear]
    columns_from: dict[str, str]
    full_in: Float[Tensor, "samples seq hidden"] | None
    quantized_in: Float[Tensor, "samples seq hidden"]
    full_out: Float[Tensor, "samples seq hidden"]
    local_out: Float[Tensor, "samples seq hidden"]
    call: BlockCall
    stats: dict[str, InputStats]
    widths: dict[str, tuple[tuple[str, int], ...]]
    space: Space = MEMORY

    def sample(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(quantized_in, full_out, local_out) of one sample, each (1, seq, hidden), on the block's device."""
        device = next(self.block.parameters()).device
        streams = (self.quantized_in, self.full_out, self.local_out)
        quantized_in, full_out, local_out = (stream[index : index + 1].to(device) for stream in streams)
        return quantized_in, full_out, local_out


@dataclass(frozen=True)
class Streams:
    """Where a walk stands: the next block to quantize and the two streams that enter it."""

    next_block: int
    full: Float[Tensor, "samples seq hidden"]
    quantized: Float[Tensor, "samples seq hidden"]


@torch.no_grad()
def advance(
    block: nn.Module,
    call: BlockCall,
    stream: Float[Tensor, "samples seq hidden"],
    device: torch.device,
    out: Float[Tensor, "samples seq hidden"] | None = None,
) -> Float[Tensor, "samples seq hidden"]:
    """Run a whole stream through a block, sample by sample, into `out`, which may be the stream itself."""
    out = torch.empty_like(stream) if out is None else out
    for index, sample in enumerate(stream):
        out[index] = call(block, sample[None].to(device))[0]
    return out


@contextmanager
def watch_inputs(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, InputStats]]:
    """Collect InputStats of these linears while the block runs inside the `with`."""
    stats = {name: InputStats.empty(m.in_features, m.weight.device) for name, m in linears.items()}
    handles = [
        module.register_forward_pre_hook(lambda _, args, s=stats[name]: s.update(args[0]))
        for name, module in linears.items()
    ]
    try:
        yield stats
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def second_moments(
    task: BlockTask, name: str, weights: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "cols cols"], Float[Tensor, "cols cols"]]:
    """(sum of y y^T, sum of x y^T) over all tokens of all ranks, float32.

    x and y are what reaches a linear: x on the full-precision stream through the original block, y on the quantized
    stream, with `weights` (parameter name -> tensor) in place of the block's own. Where not every token reaches the
    linear (an expert), tokens do not correspond, and x is taken to be y. Raises NonFiniteError naming block and linear.
    """
    linear = task.linears[name]
    assert task.full_in is not None
    device = linear.weight.device
    moments, cross = torch.zeros(2, linear.in_features, linear.in_features, device=device)
    for index, hidden in enumerate(task.full_in):
        full = _reaching(linear, task, hidden[None].to(device), None)
        quantized = _reaching(linear, task, task.sample(index)[0], weights)
        moments.addmm_(quantized.T, quantized)
        paired = len(full) == len(quantized) == len(hidden)
        cross.addmm_((full if paired else quantized).T, quantized)
    ranks.add(moments, cross)
    if not (moments.isfinite().all() and cross.isfinite().all()):
        raise NonFiniteError(f"the input of {name} in block {task.index} is not finite on the quantized stream.")
    return moments, cross


class _ReachedError(Exception):
    """Ends the run of a block where the input of a linear is known. args[0]: the input."""


def _reaching(
    linear: nn.Linear, task: BlockTask, hidden: Float[Tensor, "1 seq hidden"], weights: Mapping[str, Tensor] | None
) -> Float[Tensor, "tokens cols"]:
    """What reaches a linear of the block for one sample, float32; the block is run no further than that."""

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _ReachedError(args[0])

    handle = linear.register_forward_pre_hook(stop)
    try:
        task.call(task.block, hidden, weights)
    except _ReachedError as reached:
        inputs: Tensor = reached.args[0]
        return inputs.float().flatten(0, -2)
    finally:
        handle.remove()
    return hidden.new_zeros(0, linear.in_features)


@contextmanager
def float32_vectors(model: nn.Module) -> Iterator[None]:
    """Inside, all norm weights and biases are float32 copies, free to be changed; afterwards the model is as it was.

    A model in 16 bits needs that to run whole: its states are float32 here, and LayerNorm refuses to mix the two.
    """
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    originals = [parameter.data for parameter in vectors]
    for parameter in vectors:
        parameter.data = parameter.data.to(torch.float32, copy=True)
    try:
        yield
    finally:
        for parameter, original in zip(vectors, originals, strict=True):
            parameter.data = original


def check_weights(where: str, linears: Mapping[str, nn.Linear]) -> None:
    """Raises NonFiniteError naming the first linear whose weight has NaN or infinite values."""
    for name, linear in linears.items():
        if not linear.weight.isfinite().all():
            raise NonFiniteError(
                f"{where}.{name}.weight has NaN or infinite values; the source model is damaged or was saved in too "
                "small a dtype. Check its file."
            )


def check_stats(where: str, stats: Mapping[str, InputStats]) -> None:
    """Raises for a linear whose input was not finite, or that no token reached."""
    for name, stat in stats.items():
        if not stat.absmax.isfinite().all():
            raise NonFiniteError(f"the input of {where}.{name} is not finite on the calibration text.")
        if stat.tokens == 0:
            raise UnsupportedModel(
                f"no calibration token reached {where}.{name} (an expert without samples?); give more --samples."
            )


def tensors_to(value: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and dicts with every tensor in it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(tensors_to(v, device) for v in value)
    if isinstance(value, dict):
        return {key: tensors_to(v, device) for key, v in value.items()}
    return value
