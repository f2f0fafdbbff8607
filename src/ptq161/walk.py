"""Walk the decoder blocks of a model: read each, quantize it, drop it, carry both streams forward.

Two streams of hidden states go through the model side by side (Eq. 7): the full-precision one through the original
blocks, the quantized one through what the blocks have become. Of the disk nothing here knows more than a `Space` does.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161 import ranks
from ptq161.allocation import LAYOUTS, MIXED_WIDTHS
from ptq161.arithmetic import products_dtype
from ptq161.binarize import QuantizedWeight
from ptq161.blocks import BlockTask, Streams, advance, check_stats, check_weights, watch_inputs
from ptq161.budget import LinearShape
from ptq161.config import Allocation, QuantConfig
from ptq161.dense import DenseModel
from ptq161.discovery import Trace, block_linears, first_hidden, linear_shapes, trace
from ptq161.errors import InputError, NonFiniteError
from ptq161.fit import OnStep
from ptq161.latent import LatentWeight
from ptq161.layout import ModelLayout
from ptq161.methods import METHODS
from ptq161.methods.mixed import compensates
from ptq161.packing import pack
from ptq161.sensitivity import shared_harms
from ptq161.space import MEMORY, Space


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `first` and `last` are the half-open range of blocks; `seconds` count from the start."""

    block: int
    first: int
    last: int
    phase: str  # measure, first of all; prepare, targets, learn, save; write and distill, after the last block
    step: int
    steps: int
    loss: float | None
    seconds: float


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Prepared:
    """A model made ready: how its blocks are called, and what they will become."""

    model: DenseModel
    traced: Trace
    first: int
    last: int
    shapes: dict[str, LinearShape]  # of the linears to be quantized
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
    model: DenseModel,
    samples: Int64[Tensor, "samples seq"],
    config: QuantConfig,
    block_range: tuple[int, int] | None,
) -> Prepared:
    """Find and check the blocks, record how they are called, and give every linear the layout that needs no statistics.

    No block's weights are read. Raises UnsupportedModel (and UnsupportedModule), or InputError for a block range or a
    bit budget out of reach.
    """
    prefix, blocks = model.prefix, model.blocks
    first, last = block_range or (0, len(blocks))
    if not 0 <= first < last <= len(blocks):
        raise InputError(f"blocks {first}:{last} is out of range: the model has blocks 0:{len(blocks)} (half-open)")
    for index, block in enumerate(blocks):
        block_linears(model.skeleton, index, block)
    traced = trace(*_around(model), samples[:2])
    every = linear_shapes(model.skeleton, prefix, blocks, traced)
    quantized_blocks = tuple(f"{prefix}.{index}." for index in range(first, last))
    shapes = {name: shape for name, shape in every.items() if name.startswith(quantized_blocks)}
    layout = LAYOUTS[config.method](shapes, config, None)
    return Prepared(model, traced, first, last, shapes, layout, len(every) - len(shapes))


def _around(model: DenseModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """What comes before the blocks in float32, and the blocks in it, on meta."""
    outside = model.outside(head=False).float()
    blocks = outside.get_submodule(model.prefix)
    assert isinstance(blocks, nn.ModuleList)
    return outside, blocks


def asks_for_harms(config: QuantConfig) -> bool:
    """Whether the layout depends on what rounding costs in this model, which `allot` measures."""
    return config.method == "mixed" and config.bits is not None and config.allocation is not Allocation.UNIFORM


def allot(
    prepared: Prepared,
    samples: Int64[Tensor, "samples seq"],
    config: QuantConfig,
    device: torch.device,
    space: Space,
    on_progress: OnProgress = lambda progress: None,
) -> Prepared:
    """Divide the bit budget by what rounding each channel costs, one block on `device` at a time.

    space: holds the hidden states that enter every block. Raises InputError if a block's backward pass does not fit the
    device's memory, NonFiniteError if the model's predictions are not finite.
    """
    began = time.monotonic()

    def on_pass(done: int, total: int) -> None:
        seconds = time.monotonic() - began
        on_progress(Progress(prepared.first, prepared.first, prepared.last, "measure", done, total, None, seconds))

    chosen = samples[: config.allocation_samples]  # by all ranks; each has the streams of its share
    try:
        harms = shared_harms(
            prepared.model,
            prepared.traced.calls,
            prepared.shapes,
            first_hidden(*_around(prepared.model), ranks.share(chosen), space),
            chosen,
            MIXED_WIDTHS,
            torch.Generator().manual_seed(config.seed),
            device,
            products_dtype(config.compute, device),
            space,
            on_pass,
        )
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"a backward pass of one block does not fit the memory of {device}; give --set allocation=uniform"
        ) from error
    return replace(prepared, layout=LAYOUTS[config.method](prepared.shapes, config, harms))


def walk(
    prepared: Prepared,
    samples: Int64[Tensor, "samples seq"],
    config: QuantConfig,
    device: torch.device,
    start: Streams | None = None,
    on_progress: OnProgress = lambda progress: None,
    space: Space = MEMORY,
) -> Iterator[QuantizedBlock]:
    """Quantize block after block, yielding each as soon as it is done.

    `start` continues an interrupted walk and is overwritten by it. One block's weights are in memory at a time, on
    `device`, in float32; streams lie in `space`, those of this rank's share of the samples. Raises NonFiniteError
    naming block and linear.
    """
    began = time.monotonic()
    model, calls = prepared.model, prepared.traced.calls

    def report(index: int, phase: str, step: int = 0, steps: int = 1, loss: float | None = None) -> None:
        seconds = time.monotonic() - began
        on_progress(Progress(index, prepared.first, prepared.last, phase, step, steps, loss, seconds))

    if start is None:
        report(prepared.first, "prepare")
        hidden = first_hidden(*_around(model), ranks.share(samples), space)
        for index in range(prepared.first):
            advance(model.block(index).to(device, torch.float32), calls[index].to(device), hidden, device, hidden)
        start = Streams(prepared.first, hidden, space.copy(hidden))
    streams = start
    for index in range(start.next_block, prepared.last):
        report(index, "targets")
        done = _quantize_block(prepared, index, streams, config, device, space, partial(report, index, "learn"))
        report(index, "save", 1, 1, done.record["loss_last"])
        streams = done.streams
        yield done
        del done  # the next block comes without this one's latents


def _quantize_block(
    prepared: Prepared,
    index: int,
    streams: Streams,
    config: QuantConfig,
    device: torch.device,
    space: Space,
    on_step: OnStep,
) -> QuantizedBlock:
    """One block: targets, method, and the quantized stream through what will be stored."""
    began = time.monotonic()
    task = _block_task(prepared, index, streams, config, device, space)
    result = METHODS[config.method](task, config, on_step)
    losses = torch.tensor([result.loss_first, result.loss_last])
    if not losses.isfinite().all() or not result.outputs.isfinite().all():
        raise NonFiniteError(
            f"block {index} of {prepared.model.prefix} gives a loss of {result.loss_last} (from {result.loss_first}) "
            "with its stored factors; its activations or factors overflow. Lower lr_scale, lr_angular and lr_latent "
            "(--set)."
        )
    prefix = f"{prepared.model.prefix}.{index}"
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


def _block_task(
    prepared: Prepared, index: int, streams: Streams, config: QuantConfig, device: torch.device, space: Space
) -> BlockTask:
    """Targets of one block with its original weights; statistics are collected on the full-precision pass.

    That pass goes over the stream itself, unless the method asks for it: a run that ends here continues from its saved
    streams.
    """
    block = prepared.model.block(index).to(device, torch.float32)
    call = prepared.traced.calls[index].to(device)
    linears = block_linears(prepared.model.skeleton, index, block)
    where = f"{prepared.model.prefix}.{index}"
    check_weights(where, linears)
    kept = compensates(config)
    with watch_inputs(linears) as stats:
        full_out = advance(block, call, streams.full, device, space.like(streams.full) if kept else streams.full)
    for seen in stats.values():
        seen.combine()
    check_stats(where, stats)
    local_out = advance(block, call, streams.quantized, device, space.like(streams.quantized))
    return BlockTask(
        index=index,
        block=block,
        linears=linears,
        columns_from=prepared.traced.columns_from[index],
        full_in=streams.full if kept else None,
        quantized_in=streams.quantized,
        full_out=full_out,
        local_out=local_out,
        call=call,
        stats=stats,
        widths={
            name: tuple((group.width, group.cols) for group in prepared.layout.linears[f"{where}.{name}"].layout.groups)
            for name in linears
        },
        space=space,
    )
