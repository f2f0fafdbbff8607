"""Run a baseline over a model in memory: block after block, its weights replaced by the dequantized ones.

The walk of the baselines. Like `walk` it carries hidden states forward, but nothing is packed or written: a comparison
needs the model and its bits.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ptq161.blocks import advance, check_stats, check_weights, watch_inputs
from ptq161.discovery import block_linears, decoder_blocks, first_hidden, trace, without_blocks
from ptq161.errors import NonFiniteError
from ptq161.methods.baseline import Baseline, BaselineTask, DenseWeight, Stream

SMALLEST_ENERGY = 1e-6  # keeps the relative error of a state that is all zeros finite


@dataclass(frozen=True)
class BaselineResult:
    """A model as a baseline left it, and what storing its linears would take.

    parts: part -> bits, over all linears. blocks: index of each, its loss (`relative_error` of its output) and seconds.
    hooks: those that quantize activations; they work until they are removed.
    """

    model: PreTrainedModel
    parts: dict[str, int]
    weights: int
    blocks: list[dict[str, Any]]
    hooks: list[RemovableHandle] = field(repr=False)

    @property
    def bits_per_weight(self) -> float:
        """Honest bits: everything stored because of quantization, over the weights of the linears."""
        return sum(self.parts.values()) / self.weights


@torch.no_grad()
def apply_baseline(
    model: PreTrainedModel,
    samples: Int64[Tensor, "samples seq"],
    baseline: Baseline,
    *,
    seed: int,
    device: torch.device,
    on_block: Callable[[dict[str, Any]], None] = lambda record: None,
) -> BaselineResult:
    """Replace the weights of every linear in the decoder blocks by what `baseline` makes of them, in place.

    One block is on `device` at a time, in float32, and goes back to the dtype it had. Raises UnsupportedModel, or
    NonFiniteError naming block and linear.
    """
    prefix, blocks = decoder_blocks(model)
    with without_blocks(blocks):
        model.float()
    model.eval()
    model.requires_grad_(False)
    traced = trace(model, blocks, samples[:2])
    full = quantized = first_hidden(model, blocks, samples)
    parts: Counter[str] = Counter()
    weights = 0
    records: list[dict[str, Any]] = []
    hooks: list[RemovableHandle] = []
    for index, block in enumerate(blocks):
        began = time.monotonic()
        with _on_device(block, device):
            call, linears = traced.calls[index].to(device), block_linears(model, index, block)
            check_weights(f"{prefix}.{index}", linears)
            with watch_inputs(linears) as stats:
                wanted = advance(block, call, full, device)
            check_stats(f"{prefix}.{index}", stats)
            inputs = full if baseline.calibrates_on is Stream.FULL else quantized
            task = BaselineTask(index, block, linears, traced.columns_from[index], inputs, wanted, call)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            dense = baseline(task, generator)
            hooks += _install(f"{prefix}.{index}", linears, dense)
            quantized = advance(block, call, quantized, device)
        for weight in dense.values():
            parts.update(weight.bits)
            weights += weight.weight.numel()
        full = wanted
        record = {"index": index, "loss": relative_error(quantized, full), "seconds": time.monotonic() - began}
        records.append(record)
        on_block(record)
    return BaselineResult(model, dict(parts), weights, records, hooks)


def relative_error(actual: Float[Tensor, "samples seq hidden"], wanted: Float[Tensor, "samples seq hidden"]) -> float:
    """Squared error over squared norm, per token, averaged."""
    energy = wanted.square().sum(dim=-1) + SMALLEST_ENERGY
    return ((actual - wanted).square().sum(dim=-1) / energy).mean().item()


def _install(where: str, linears: dict[str, nn.Linear], dense: dict[str, DenseWeight]) -> Iterator[RemovableHandle]:
    """Put the dequantized weights into the linears. Yields the hooks of those whose inputs are quantized, too."""
    for name, linear in linears.items():
        result = dense[name]
        if not result.weight.isfinite().all():
            raise NonFiniteError(f"the method gives {where}.{name}.weight NaN or infinite values")
        linear.weight.data.copy_(result.weight)
        if result.round_input is not None:
            yield linear.register_forward_pre_hook(partial(_round_input, result.round_input))


def _round_input(round_input: Callable[[Tensor], Tensor], linear: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return round_input(args[0]).to(args[0].dtype)


@contextmanager
def _on_device(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold one block on a device in float32, and put it back as it was."""
    parameter = next(block.parameters())
    home, dtype = parameter.device, parameter.dtype
    block.to(device=device, dtype=torch.float32)
    try:
        yield
    finally:
        block.to(device=home, dtype=dtype)
