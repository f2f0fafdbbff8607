"""Causal attention of whole sequences on a CPU, forward and backward: what a quantization run attends with.

transformers' `eager` makes every score, the half that is masked as well, and goes over all of them a dozen times; the
backward pass of torch's fused CPU kernel takes longer still. Here queries go in groups of neighbours, each with only
the keys before its end, and heads that share keys are one product (docs/decisions/0024). Masks other than the plain
causal one go to transformers' `sdpa`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CAUSAL = "ptq161_causal"
QUERIES_AT_ONCE = 128  # their scores, in float32, should stay in the processor's cache


def attend_causally(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch key_heads positions width"],
    value: Float[Tensor, "batch key_heads positions value_width"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[Float[Tensor, "batch queries heads value_width"], None]:
    """transformers' `sdpa`, with a plain causal mask by `_Causal`. Signature and result are its."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = attention_mask is None and query.shape[2] == key.shape[2] and settings.get("position_bias") is None
    if not (causal and whole) or dropout:
        arguments = (query, key, value, attention_mask, dropout, scaling, is_causal)
        result: tuple[Tensor, None] = sdpa_attention_forward(module, *arguments, **settings)
        return result
    batch, heads, length, width = query.shape
    groups = batch * key.shape[1]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    attended: Tensor = _Causal.apply(  # type: ignore[no-untyped-call]
        query.to(dtype).reshape(groups, -1, length, width),
        key.to(dtype).reshape(groups, length, width),
        value.to(dtype).reshape(groups, length, -1),
        width**-0.5 if scaling is None else scaling,
    )
    return attended.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


class _Causal(torch.autograd.Function):
    """softmax(scale * Q K^T, causal) V for heads in groups that share K and V; probabilities are in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "groups shared length width"],
        key: Float[Tensor, "groups length width"],
        value: Float[Tensor, "groups length value_width"],
        scale: float,
    ) -> Float[Tensor, "groups shared length value_width"]:
        groups, shared, length, _ = query.shape
        result = value.new_empty(groups, shared, length, value.shape[2])
        after = torch.full((QUERIES_AT_ONCE, QUERIES_AT_ONCE), float("-inf")).triu_(1)
        kept = []
        for first, last in _spans(length):
            scores = torch.bmm(_rows(query, first, last), key[:, :last].mT).float().mul_(scale)
            count = last - first
            scores.view(groups, shared, count, last)[..., first:].add_(after[:count, :count])
            chances = scores.softmax(-1).to(value.dtype)
            result[:, :, first:last] = torch.bmm(chances, value[:, :last]).view(groups, shared, count, -1)
            if any(ctx.needs_input_grad):
                kept.append(chances)
        ctx.save_for_backward(query, key, value, result, *kept)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, result, *kept = ctx.saved_tensors
        to_query = torch.empty_like(query)
        to_key, to_value = (torch.zeros(side.shape) for side in (key, value))
        # What softmax's backward pass takes off each row: sum of chance times gradient, the same as result times grad.
        level = (grad.float() * result.float()).sum(-1, keepdim=True)
        for (first, last), chances in zip(_spans(query.shape[2]), kept, strict=True):
            rows = _rows(grad, first, last)
            to_value[:, :last] += torch.bmm(chances.mT, rows)
            to_scores = torch.bmm(rows, value[:, :last].mT).float().sub_(_rows(level, first, last))
            to_scores = to_scores.mul_(chances).mul_(ctx.scale).to(query.dtype)
            to_query[:, :, first:last] = torch.bmm(to_scores, key[:, :last]).view_as(query[:, :, first:last])
            to_key[:, :last] += torch.bmm(to_scores.mT, _rows(query, first, last))
        return to_query, to_key.to(key.dtype), to_value.to(value.dtype), None


def _spans(length: int) -> list[tuple[int, int]]:
    return [(first, min(first + QUERIES_AT_ONCE, length)) for first in range(0, length, QUERIES_AT_ONCE)]


def _rows(states: Float[Tensor, "groups shared length width"], first: int, last: int) -> Tensor:
    """Some positions of all heads of a group, below each other: (groups, shared * positions, width)."""
    return states[:, :, first:last].flatten(1, 2)


@contextmanager
def fast_attention(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """On a CPU, let the model attend with `attend_causally`; with `eager` where it is not made for `sdpa`.

    Models that do not ask transformers which function to use keep theirs.
    """
    if device.type != "cpu" or not model._can_set_attn_implementation():
        yield
        return
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)  # which only `eager` heeds
    before: str = model.config._attn_implementation
    model.set_attn_implementation(CAUSAL if model._supports_sdpa and capped is None else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(CAUSAL, attend_causally)
AttentionMaskInterface.register(CAUSAL, sdpa_mask)
