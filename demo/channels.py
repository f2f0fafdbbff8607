"""How large the input channels of a few linears are on the calibration text, and which the packed model marks."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from ptq161.blocks import watch_inputs
from ptq161.config import CalibrationConfig, Statistic
from ptq161.data import calibration_tokens
from ptq161.discovery import decoder_blocks
from ptq161.linear import PackedLinear
from ptq161.methods.ptq161 import channel_importance
from ptq161.packing import unpack
from ptq161.sources import open_dense, open_model

MEASURES = {Statistic.ABSMAX: "largest |x|", Statistic.ABSMEAN: "mean |x|"}
CORNER_ROWS, CORNER_COLUMNS = 8, 40


def measure(model: Path, packed: Path) -> dict[str, Any]:
    """For three linears over the depth of the model: size of every input channel and the mask; some codes.

    Text and statistic are those of the quantization (its run.json), so the mask must mark the largest channels.
    """
    run = json.loads((packed / "run.json").read_text())
    recorded, statistic = run["calibration"], Statistic(run["config"]["statistic"])
    calibration = CalibrationConfig(
        tuple(recorded["sources"]), recorded["samples"], recorded["seqlen"], recorded["seed"]
    )
    source = open_dense(model)
    tokens = calibration_tokens(calibration, source.tokenizer)
    prefix, _ = decoder_blocks(source.model)
    model_packed, _ = open_model(packed, mode="packed")
    quantized = {name: module for name, module in model_packed.named_modules() if isinstance(module, PackedLinear)}
    # Of the first, a middle and the last quantized block: its first linear, its last, its first.
    names = list(quantized)
    blocks = sorted({int(name.removeprefix(f"{prefix}.").partition(".")[0]) for name in names})
    chosen = []
    for block, position in ((blocks[0], 0), (blocks[len(blocks) // 3], -1), (blocks[-1], 0)):
        chosen.append((block, [name for name in names if name.startswith(f"{prefix}.{block}.")][position]))
    linears = {name: source.model.get_submodule(name) for _, name in chosen}
    with watch_inputs(linears) as stats, torch.inference_mode():  # type: ignore[arg-type]
        for sample in track(tokens, description="  windows of text"):
            source.model.base_model(sample[None], use_cache=False)
    return {
        "channels": [
            {
                "block": block,
                "linear": name.removeprefix(f"{prefix}.{block}."),
                "measure": MEASURES[statistic],
                "magnitude": channel_importance(stats[name], statistic).tolist(),
                "salient": salient_mask(quantized[name]),
            }
            for block, name in chosen
        ],
        "corner": corner(chosen[0][1], quantized[chosen[0][1]]),
    }


def salient_mask(linear: PackedLinear) -> list[bool]:
    """Which input channels are not binarized."""
    mask = torch.zeros(linear.in_features, dtype=torch.bool)
    for group in unpack(linear.packed()).groups:
        mask[group.columns] = group.width.name != "1bit"
    return mask.tolist()


def corner(name: str, linear: PackedLinear) -> dict[str, Any]:
    """The stored levels of the first rows and columns."""
    levels = torch.zeros(linear.out_features, linear.in_features, dtype=torch.int8)
    for group in unpack(linear.packed()).groups:
        levels[:, group.columns] = group.codes
    return {
        "linear": name,
        "codes": levels[:CORNER_ROWS, :CORNER_COLUMNS].tolist(),
        "salient": salient_mask(linear)[:CORNER_COLUMNS],
    }
