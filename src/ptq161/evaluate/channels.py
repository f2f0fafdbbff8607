"""Input channels: how large what reaches them is, and which code width each got in a packed model."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.blocks import watch_inputs
from ptq161.discovery import block_linears, decoder_blocks
from ptq161.hf import load
from ptq161.linear import PackedLinear
from ptq161.packing import unpack


@torch.inference_mode()
def channel_magnitudes(model: PreTrainedModel, samples: Int64[Tensor, "samples seq"]) -> list[dict[str, Any]]:
    """Mean magnitude of inputs and weights by channel: first and last linear of the first, a middle and the last block.

    Entries are {"block", "linear", "inputs", "weights"}, the last two with a number per channel.
    """
    _, blocks = decoder_blocks(model)
    chosen = {}
    for index in sorted({0, len(blocks) // 2, len(blocks) - 1}):
        linears = block_linears(model, index, blocks[index])
        for name in (next(iter(linears)), next(reversed(linears))):
            chosen[f"{index}.{name}"] = linears[name]
    with watch_inputs(chosen) as stats:
        for sample in samples:
            model.base_model(input_ids=sample[None].to(model.device), use_cache=False)
    return [
        {
            "block": int(key.partition(".")[0]),
            "linear": key.partition(".")[2],
            "inputs": (stats[key].abs_sum / stats[key].tokens).tolist(),
            "weights": linear.weight.float().abs().mean(dim=0).tolist(),
        }
        for key, linear in chosen.items()
    ]


def width_map(folder: Path) -> list[list[str]]:
    """Of a packed model: for the first quantized linear of every block the code width of each input channel."""
    model = load(folder, mode="packed")
    rows = []
    for block in decoder_blocks(model)[1]:
        first = next((module for module in block.modules() if isinstance(module, PackedLinear)), None)
        if first is not None:
            widths = [""] * first.in_features
            for group in unpack(first.packed()).groups:
                for channel in group.columns.tolist():
                    widths[channel] = group.width.name
            rows.append(widths)
    return rows
