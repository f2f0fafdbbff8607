"""How much the input channels of a few linears count on the calibration text, and the code width each of them got."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from ptq161.blocks import InputStats, watch_inputs
from ptq161.config import CalibrationConfig, Statistic
from ptq161.data import calibration_tokens
from ptq161.discovery import decoder_blocks
from ptq161.linear import PackedLinear
from ptq161.methods.mixed import shared_importance
from ptq161.methods.ptq161 import channel_importance
from ptq161.packing import unpack
from ptq161.sources import open_model

MEASURES = {
    Statistic.ABSMAX: "largest |x|",
    Statistic.ABSMEAN: "mean |x|",
    Statistic.HESSIAN: "x² · error of signs²",
}
MIXED_MEASURE = "mean x² × sum of w²"
CORNER_ROWS, CORNER_COLUMNS = 8, 32
NARROW_COLUMNS = 16  # of the corner are surely seen on a phone


def measure(model: Path, packed: Path) -> dict[str, Any]:
    """For three linears over the depth of the model: importance and code width of every input channel; some codes.

    Text and measure are those of the quantization (its run.json), so the most important channels must be the widest.
    """
    run = json.loads((packed / "run.json").read_text())
    recorded = run["calibration"]
    calibration = CalibrationConfig(
        tuple(recorded["sources"]), recorded["samples"], recorded["seqlen"], recorded["seed"]
    )
    source, tokenizer = open_model(model)
    tokens = calibration_tokens(calibration, tokenizer, source)
    prefix, _ = decoder_blocks(source)
    model_packed, _ = open_model(packed, mode="packed")
    quantized = {name: module for name, module in model_packed.named_modules() if isinstance(module, PackedLinear)}
    # Of the first, a middle and the last quantized block: its first linear, its last, its first.
    names = list(quantized)
    blocks = sorted({int(name.removeprefix(f"{prefix}.").partition(".")[0]) for name in names})
    chosen = []
    for block, position in ((blocks[0], 0), (blocks[len(blocks) // 3], -1), (blocks[-1], 0)):
        chosen.append((block, [name for name in names if name.startswith(f"{prefix}.{block}.")][position]))
    sharing = {name: _sharing(quantized, name) for _, name in chosen}
    watched = dict.fromkeys(name for group in sharing.values() for name in group)
    linears: dict[str, Any] = {name: source.get_submodule(name) for name in watched}
    with watch_inputs(linears) as stats, torch.inference_mode():
        for sample in track(tokens, description="  windows of text"):
            source.base_model(sample[None], use_cache=False)
    shown = []
    for block, name in chosen:
        label, importance = ranking(run["config"], {other: linears[other] for other in sharing[name]}, stats)
        shown.append(
            {
                "block": block,
                "linear": name.removeprefix(f"{prefix}.{block}."),
                "measure": label,
                "importance": importance.tolist(),
                "widths": channel_widths(quantized[name]),
            }
        )
    return {"channels": shown, "corner": corner(chosen[0][1], quantized[chosen[0][1]])}


def ranking(
    config: Mapping[str, Any], linears: Mapping[str, nn.Linear], stats: Mapping[str, InputStats]
) -> tuple[str, Tensor]:
    """Name and values, (cols,), of the measure that ranked the channels of these linears, which see the same input."""
    first = next(iter(linears))
    if config["method"] == "mixed":
        total = shared_importance(linears, stats, dict.fromkeys(linears, first))[first]
        return MIXED_MEASURE, total / stats[first].tokens
    statistic = Statistic(config["statistic"])
    weights = [linear.weight.detach() for linear in linears.values()]
    return MEASURES[statistic], channel_importance(stats[first], weights, statistic)


def channel_widths(linear: PackedLinear) -> list[str]:
    """The code width of every input channel."""
    widths = [""] * linear.in_features
    for group in unpack(linear.packed()).groups:
        for channel in group.columns.tolist():
            widths[channel] = group.width.name
    return widths


def corner(name: str, linear: PackedLinear) -> dict[str, Any]:
    """The stored levels of the first rows, from the first channel on that has every code width not far behind it."""
    levels = torch.zeros(linear.out_features, linear.in_features, dtype=torch.int8)
    for group in unpack(linear.packed()).groups:
        levels[:, group.columns] = group.codes
    widths = channel_widths(linear)
    starts = range(max(1, linear.in_features - CORNER_COLUMNS + 1))
    first = max(starts, key=lambda start: len(set(widths[start : start + NARROW_COLUMNS])))
    return {
        "linear": name,
        "first_channel": first,
        "codes": levels[:CORNER_ROWS, first : first + CORNER_COLUMNS].tolist(),
        "widths": widths[first : first + CORNER_COLUMNS],
    }


def _sharing(quantized: Mapping[str, PackedLinear], name: str) -> list[str]:
    """The linears with the same column groups as this one, in order: they see the same input."""
    owner = quantized[name].spec.columns_from or name
    return [other for other, linear in quantized.items() if owner in (other, linear.spec.columns_from)]
