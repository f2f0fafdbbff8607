"""How much each input channel of each linear matters to the model's predictions: one backward pass per sample.

A change dW of a weight moves the output of its linear by dW @ x. To second order this costs, in Kullback-Leibler
divergence of the predictions, sum_ij F_i * H_jj * dW_ij^2 / 2 per token, with F_i the mean square of the gradient at
output i and H_jj the mean square of input j (both independent, rows and channels uncorrelated). Gradients are those of
labels drawn from the model's own predictions, which makes F the Fisher information and needs no text beyond the inputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.binarize import CodeWidth, nearest_level
from ptq161.budget import LinearShape
from ptq161.mixed import best_scale


@dataclass
class Squares:
    """Sums over tokens of the squares at one linear: inputs (cols,), gradients at the outputs (rows,)."""

    inputs: Float[Tensor, " cols"]
    gradients: Float[Tensor, " rows"]
    tokens: int = 0


def shared_harms(
    model: PreTrainedModel,
    shapes: Mapping[str, LinearShape],
    samples: Int64[Tensor, "samples seq"],
    widths: tuple[CodeWidth, ...],
    generator: torch.Generator,
) -> dict[str, Float[Tensor, "cols widths"]]:
    """First linear of each shared input -> expected divergence per token from rounding its channels to each width."""
    linears = {
        name: module for name, module in model.named_modules() if name in shapes and isinstance(module, nn.Linear)
    }
    squares = measure_squares(model, linears, samples, generator)
    harms: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        owner, harm = shape.columns_from or name, column_harm(linears[name].weight.float(), squares[name], widths).cpu()
        harms[owner] = harms[owner] + harm if owner in harms else harm
    return harms


def measure_squares(
    model: PreTrainedModel,
    linears: Mapping[str, nn.Linear],
    samples: Int64[Tensor, "samples seq"],
    generator: torch.Generator,
) -> dict[str, Squares]:
    """Run every sample forward and backward through the whole model, in bfloat16; no weight takes a gradient."""
    with _watched(model, linears) as squares, torch.autocast(samples.device.type, torch.bfloat16):
        for sample in samples:
            logits = model(sample[None], use_cache=False).logits[0].float()
            chances = logits.detach().softmax(-1).cpu()  # drawn on the CPU: the same labels on every device
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return squares


@contextmanager
def _watched(model: PreTrainedModel, linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, Squares]]:
    squares = {
        name: Squares(
            inputs=torch.zeros(linear.in_features, device=linear.weight.device),
            gradients=torch.zeros(linear.out_features, device=linear.weight.device),
        )
        for name, linear in linears.items()
    }
    handles = [linear.register_forward_hook(partial(_watch, squares[name])) for name, linear in linears.items()]
    embedding = model.get_input_embeddings()
    # Without a gradient at the very first hidden state there would be no backward pass at all: all weights are frozen.
    handles.append(embedding.register_forward_hook(lambda _, args, output: output.requires_grad_()))
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
