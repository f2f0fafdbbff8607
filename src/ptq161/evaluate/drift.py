"""How far a model's hidden states have come from the original's, block after block, on the same tokens."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.baselines import relative_error
from ptq161.discovery import decoder_blocks


@torch.inference_mode()
def block_outputs(model: PreTrainedModel, tokens: Int64[Tensor, " seq"]) -> list[Float[Tensor, "1 seq hidden"]]:
    """What every decoder block gives for these tokens, float32, on the CPU. Raises UnsupportedModel."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(partial(_keep, outputs)) for block in decoder_blocks(model)[1]]
    try:
        model(input_ids=tokens[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def block_errors(
    model: PreTrainedModel, tokens: Int64[Tensor, " seq"], wanted: list[Float[Tensor, "1 seq hidden"]]
) -> list[float]:
    """`relative_error` of every block's output against what it should be."""
    return [relative_error(*pair) for pair in zip(block_outputs(model, tokens), wanted, strict=True)]


def _keep(outputs: list[Tensor], block: nn.Module, args: Any, output: Any) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    outputs.append(hidden.float().cpu())
