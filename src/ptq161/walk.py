"""Walk the decoder blocks of a model in memory: quantize each, carry both streams forward.

Two streams of hidden states go through the model side by side (Eq. 7): the full-precision one through the original
blocks, the quantized one through what the blocks have become. Nothing here touches the disk.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.allocation import LAYOUTS, MIXED_WIDTHS
from ptq161.binarize import QuantizedWeight
from ptq161.blocks import BlockTask, Streams, advance, check_stats, check_weights, float32_vectors, watch_inputs
from ptq161.budget import LinearShape
from ptq161.config import Allocation, QuantConfig
from ptq161.discovery import Trace, block_linears, decoder_blocks, first_hidden, linear_shapes, trace, without_blocks
from ptq161.errors import InputError, NonFiniteError
from ptq161.fit import OnStep
from ptq161.latent import LatentWeight
from ptq161.layout import ModelLayout
from ptq161.methods import METHODS
from ptq161.packing import pack
from ptq161.sensitivity import shared_harms


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `first` and `last` are the half-open range of blocks; `seconds` count from the start."""

    block: int
    first: int
    last: int
    phase: str  # prepare, targets, learn, save; distill, after the last block
    step: int
    steps: int
    loss: float | None
    seconds: float


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Prepared:
    """A model made ready: its blocks, how they are called, and what they will become. Everything but blocks is fp32."""

    model: PreTrainedModel
    prefix: str
    blocks: nn.ModuleList
    traced: Trace
    first: int
    last: int
    layout: ModelLayout
    dense_linears: int  # linears of the decoder blocks outside first..last-1


@dataclass(frozen=True)
class QuantizedBlock:
    """One finished block: packed tensors by full name, the JSON record, and the streams into the next block.

    latents: by full name, what the codes were rounded from, where the method learned them.
    """

    index: int
    prefix: str  # the block's module name
    packed: dict[str, Tensor]
    record: dict[str, Any]
    streams: Streams
    latents: dict[str, LatentWeight]


def prepare(
    model: PreTrainedModel,
    samples: Int64[Tensor, "samples seq"],
    config: QuantConfig,
    block_range: tuple[int, int] | None,
    device: torch.device,
    *,
    calibrated: bool = True,
) -> Prepared:
    """Find and check the blocks, record how they are called, and fix the layout of every linear.

    calibrated: whether `samples` are text that may decide the layout; otherwise it is what can be known without.

    Raises UnsupportedModel (and UnsupportedModule), or InputError for a block range or a bit budget out of reach.
    """
    prefix, blocks = decoder_blocks(model)
    first, last = block_range or (0, len(blocks))
    if not 0 <= first < last <= len(blocks):
        raise InputError(f"blocks {first}:{last} is out of range: the model has blocks 0:{len(blocks)} (half-open)")
    for index, block in enumerate(blocks):
        block_linears(model, index, block)
    with without_blocks(blocks):
        model.float()
    model.eval()
    model.requires_grad_(False)
    traced = trace(model, blocks, samples[:2], device)
    every = linear_shapes(model, prefix, blocks, traced)
    quantized_blocks = tuple(f"{prefix}.{index}." for index in range(first, last))
    shapes = {name: shape for name, shape in every.items() if name.startswith(quantized_blocks)}
    harms = _harms(model, shapes, samples, config, device) if calibrated else None
    layout = LAYOUTS[config.method](shapes, config, harms)
    return Prepared(model, prefix, blocks, traced, first, last, layout, len(every) - len(shapes))


def _harms(
    model: PreTrainedModel,
    shapes: Mapping[str, LinearShape],
    samples: Int64[Tensor, "samples seq"],
    config: QuantConfig,
    device: torch.device,
) -> dict[str, Tensor] | None:
    """What decides the widths of every linear, or None where the method or the settings do not ask for it.

    Raises InputError if the backward pass of the whole model does not fit the device's memory.
    """
    if config.method != "mixed" or config.bits is None or config.allocation is Allocation.UNIFORM:
        return None
    generator = torch.Generator().manual_seed(config.seed)
    home = next(model.parameters()).device
    try:
        model.to(device)  # type: ignore[arg-type]
        chosen = samples[: config.allocation_samples].to(device)
        with float32_vectors(model):
            return shared_harms(model, shapes, chosen, MIXED_WIDTHS, generator)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"a backward pass of the whole model does not fit the memory of {device}; give --set allocation=uniform"
        ) from error
    finally:
        model.to(home)  # type: ignore[arg-type]


def walk(
    prepared: Prepared,
    samples: Int64[Tensor, "samples seq"],
    config: QuantConfig,
    device: torch.device,
    start: Streams | None = None,
    on_progress: OnProgress = lambda progress: None,
) -> Iterator[QuantizedBlock]:
    """Quantize block after block, yielding each as soon as it is done.

    `start` continues an interrupted walk. One block is on `device` at a time, in float32; the model keeps its
    original weights. Raises NonFiniteError naming block and linear.
    """
    began = time.monotonic()
    model, blocks = prepared.model, prepared.blocks

    def report(index: int, phase: str, step: int = 0, steps: int = 1, loss: float | None = None) -> None:
        seconds = time.monotonic() - began
        on_progress(Progress(index, prepared.first, prepared.last, phase, step, steps, loss, seconds))

    if start is None:
        report(prepared.first, "prepare")
        hidden = first_hidden(model, blocks, samples)
        for index in range(prepared.first):
            with _on_device(blocks[index], device):
                hidden = advance(blocks[index], prepared.traced.calls[index], hidden, device)
        start = Streams(prepared.first, hidden, hidden.clone())
    streams = start
    for index in range(start.next_block, prepared.last):
        with _on_device(blocks[index], device):
            report(index, "targets")
            on_step = partial(report, index, "learn")
            block = _quantize_block(prepared, index, streams, config, device, on_step)
        report(index, "save", 1, 1, block.record["loss_last"])
        yield block
        streams = block.streams


def _quantize_block(
    prepared: Prepared, index: int, streams: Streams, config: QuantConfig, device: torch.device, on_step: OnStep
) -> QuantizedBlock:
    """One block: targets, method, and the quantized stream through what will be stored."""
    began = time.monotonic()
    task = _block_task(prepared, index, streams, device)
    result = METHODS[config.method](task, config, on_step)
    losses = torch.tensor([result.loss_first, result.loss_last])
    if not losses.isfinite().all() or not result.outputs.isfinite().all():
        raise NonFiniteError(
            f"block {index} of {prepared.prefix} gives a loss of {result.loss_last} (from {result.loss_first}) with "
            "its stored factors; its activations or factors overflow. Lower lr_scale, lr_angular and lr_latent (--set)."
        )
    prefix = f"{prepared.prefix}.{index}"
    tensors = packed_tensors({f"{prefix}.{name}": weight for name, weight in result.weights.items()}, prepared.layout)
    seconds = time.monotonic() - began
    record = {
        "index": index,
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
        "seconds": seconds,
    }
    latents = {f"{prefix}.{name}": weight for name, weight in (result.latents or {}).items()}
    return QuantizedBlock(index, prefix, tensors, record, Streams(index + 1, task.full_out, result.outputs), latents)


def packed_tensors(weights: Mapping[str, QuantizedWeight], layout: ModelLayout) -> dict[str, Tensor]:
    """Full tensor name -> packed tensor on the CPU, for linears by full name; shared column types once."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        spec, packed = layout.linears[name], pack(weight)
        assert packed.layout == spec.layout, (name, packed.layout, spec.layout)
        tensors |= {f"{name}.{tensor}": packed.tensors[tensor].cpu() for tensor in spec.specs()}
    return tensors


def _block_task(prepared: Prepared, index: int, streams: Streams, device: torch.device) -> BlockTask:
    """Targets of one block with its original weights; statistics are collected on the full-precision pass."""
    block, call = prepared.blocks[index], prepared.traced.calls[index].to(device)
    linears = block_linears(prepared.model, index, block)
    where = f"{prepared.prefix}.{index}"
    check_weights(where, linears)
    with watch_inputs(linears) as stats:
        full_out = advance(block, call, streams.full, device)
    check_stats(where, stats)
    local_out = advance(block, call, streams.quantized, device)
    return BlockTask(
        index=index,
        block=block,
        linears=linears,
        columns_from=prepared.traced.columns_from[index],
        full_in=streams.full,
        quantized_in=streams.quantized,
        full_out=full_out,
        local_out=local_out,
        call=call,
        stats=stats,
        widths={
            name: tuple((group.width, group.cols) for group in prepared.layout.linears[f"{where}.{name}"].layout.groups)
            for name in linears
        },
    )


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
