"""What rounding a channel costs in the model's own predictions: one backward pass per sample, block by block.

A change dW of a weight moves the output of its linear by dW @ x. To second order this costs, in Kullback-Leibler
divergence of the predictions, sum_ij F_i * H_jj * dW_ij^2 / 2 per token, with F_i the mean square of the gradient at
output i and H_jj the mean square of input j (both independent, rows and channels uncorrelated). Gradients are those of
labels drawn from the model's own predictions, which makes F the Fisher information and needs no text beyond the inputs.

One block at a time has its weights in memory. Forward, the hidden states that enter each block are kept in a `Space`;
backward, each block runs again on them and hands the gradient at its input to the block before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ptq161 import ranks
from ptq161.arithmetic import products_in, widen
from ptq161.binarize import CodeWidth, nearest_level
from ptq161.blocks import BlockCall, float32_vectors
from ptq161.budget import LinearShape
from ptq161.dense import DenseModel
from ptq161.discovery import block_linears, replaced_blocks, without_blocks
from ptq161.draws import tokens_at
from ptq161.errors import NonFiniteError
from ptq161.mixed import best_scale
from ptq161.space import Space

OnPass = Callable[[int, int], None]  # blocks gone through, forward and backward, of how many


@dataclass
class Squares:
    """Sums over tokens of the squares at one linear: inputs (cols,), gradients at the outputs (rows,)."""

    inputs: Float[Tensor, " cols"]
    gradients: Float[Tensor, " rows"]
    tokens: int = 0

    def combine(self) -> None:
        """Take in what the other ranks have seen."""
        ranks.add(self.inputs, self.gradients)
        self.tokens = int(ranks.total(self.tokens)[0])


def shared_harms(
    model: DenseModel,
    calls: Sequence[BlockCall],
    shapes: Mapping[str, LinearShape],
    hidden: Float[Tensor, "own seq hidden"],
    samples: Int64[Tensor, "samples seq"],
    widths: tuple[CodeWidth, ...],
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    space: Space,
    on_pass: OnPass = lambda done, total: None,
) -> dict[str, Float[Tensor, "cols widths"]]:
    """First linear of each shared input -> expected divergence per token from rounding its channels to each width.

    hidden: what enters the first block for this rank's share of `samples`; it is overwritten. dtype: of the matrix
    products (`arithmetic`). Raises NonFiniteError.
    """
    harms: dict[str, Tensor] = {}
    arguments = (model, calls, shapes, hidden, samples, generator, device, dtype, space, on_pass)
    for linears, squares in measure_squares(*arguments):
        for name, linear in linears.items():
            owner = shapes[name].columns_from or name
            harm = column_harm(linear.weight.float(), squares[name], widths).cpu()
            harms[owner] = harms[owner] + harm if owner in harms else harm
    return harms


def measure_squares(
    model: DenseModel,
    calls: Sequence[BlockCall],
    names: Mapping[str, Any],
    hidden: Float[Tensor, "own seq hidden"],
    samples: Int64[Tensor, "samples seq"],
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    space: Space,
    on_pass: OnPass = lambda done, total: None,
) -> Iterator[tuple[dict[str, nn.Linear], dict[str, Squares]]]:
    """Every sample forward and backward through the whole model; no weight takes a gradient.

    Yields the linears of `names` and their squares, block by block from the last to the first of them. Arguments and
    numbers are those of `shared_harms`; the result is that of a backward pass through the whole model at once.
    """
    blocks = range(len(model.blocks))
    first = min(index for index in blocks if any(name.startswith(f"{model.prefix}.{index}.") for name in names))
    total = 2 * len(blocks) - first
    inputs = space.empty((len(blocks) - first, *hidden.shape))
    for index in blocks:
        if index >= first:
            inputs[index - first] = hidden
        with _ready(model, index, calls, device, dtype) as (_, run), torch.no_grad():
            for number in range(len(hidden)):
                hidden[number] = run(hidden[number : number + 1].to(device))[0]
        on_pass(index + 1, total)
    gradients = _gradients_after_blocks(model, calls, hidden, samples, generator, device, dtype)
    for index in reversed(blocks[first:]):
        with _ready(model, index, calls, device, dtype) as (block, run):
            every = block_linears(model.skeleton, index, block)
            linears = {f"{model.prefix}.{index}.{name}": linear for name, linear in every.items()}
            linears = {name: linear for name, linear in linears.items() if name in names}
            with _watched(linears) as squares:
                for number in range(len(gradients)):
                    entering = inputs[index - first, number : number + 1].to(device, copy=True).requires_grad_()
                    run(entering).backward(gradients[number : number + 1].to(device))
                    assert entering.grad is not None
                    gradients[number] = entering.grad[0]
        for sums in squares.values():
            sums.combine()
        on_pass(2 * len(blocks) - index, total)
        yield linears, squares


@contextmanager
def _ready(
    model: DenseModel, index: int, calls: Sequence[BlockCall], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """A block on a device, and a function that runs it on one sample."""
    block, call = model.block(index).to(device), calls[index].to(device)
    widen(block, dtype)
    with float32_vectors(block), products_in(dtype, device):
        yield block, lambda hidden: call(block, hidden)


def _gradients_after_blocks(
    model: DenseModel,
    calls: Sequence[BlockCall],
    hidden: Float[Tensor, "own seq hidden"],
    samples: Int64[Tensor, "samples seq"],
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "own seq hidden"]:
    """The gradients at the output of the last block, written over `hidden`, its values for this rank's samples."""
    outside = model.outside(head=True)
    blocks = outside.get_submodule(model.prefix)
    assert isinstance(blocks, nn.ModuleList)
    with without_blocks(blocks):
        outside.to(device)  # type: ignore[arg-type]
        widen(outside, dtype)
    leaf = hidden

    def forward(index: int, ignored: Tensor, *args: Any, **kwargs: Any) -> Any:
        return calls[index].returned(leaf)

    with (
        float32_vectors(outside),
        replaced_blocks(blocks, forward),
        products_in(dtype, device),
    ):
        for index, sample in enumerate(samples):
            points = torch.rand(len(sample), generator=generator)  # by every rank: the next sample's depend on it
            if not ranks.own([index]):
                continue
            number = index // ranks.count()
            leaf = hidden[number : number + 1].to(device, copy=True).requires_grad_()
            logits = outside(sample[None].to(device), use_cache=False).logits[0].float()
            chances = logits.detach().softmax(-1).cpu()  # drawn on the CPU: the same labels on every device
            if not chances.isfinite().all():
                raise NonFiniteError(f"{type(model.skeleton).__name__} predicts NaN on calibration sample {index}.")
            drawn = tokens_at(points, chances).to(device)
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
            assert leaf.grad is not None
            hidden[number] = leaf.grad[0]
    return hidden


@contextmanager
def _watched(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, Squares]]:
    squares = {
        name: Squares(
            inputs=torch.zeros(linear.in_features, device=linear.weight.device),
            gradients=torch.zeros(linear.out_features, device=linear.weight.device),
        )
        for name, linear in linears.items()
    }
    handles = [linear.register_forward_hook(partial(_watch, squares[name])) for name, linear in linears.items()]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()


def _watch(squares: Squares, linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    inputs = args[0].detach().float().flatten(0, -2)
    squares.inputs += inputs.square().sum(dim=0)
    squares.tokens += len(inputs)
    output.register_hook(partial(_add_gradient, squares))


def _add_gradient(squares: Squares, gradient: Tensor) -> None:
    squares.gradients += gradient.float().flatten(0, -2).square().sum(dim=0)


def column_harm(
    weight: Float[Tensor, "rows cols"], squares: Squares, widths: tuple[CodeWidth, ...]
) -> Float[Tensor, "cols widths"]:
    """Expected divergence per token from rounding each channel of a linear to each width, on its best row scales."""
    inputs, gradients = squares.inputs / squares.tokens, squares.gradients / squares.tokens
    harms = []
    for width in widths:
        scale = best_scale(weight, width, inputs)
        error = nearest_level(weight / scale, width).mul_(scale).sub_(weight).square_()
        harms.append((gradients @ error) * inputs / 2)
    return torch.stack(harms, dim=1)
