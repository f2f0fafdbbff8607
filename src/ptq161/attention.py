"""One query per head against a key-value cache whose heads are shared, on a CPU: what a token in decoding attends with.

torch's CPU kernel takes as long for one query of a head as for many, and goes through the query heads one by one. Heads
that share keys and values are as good as several queries of one head: the same sums, several times faster
(docs/decisions/0020). Everything else goes to transformers' own function.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

STANDARD = "sdpa"
FOLDED = "ptq161_sdpa"


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch key_heads positions width"],
    value: Float[Tensor, "batch key_heads positions width"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[Float[Tensor, "batch queries heads width"], None]:
    """transformers' `sdpa`, with the heads of one query folded where they share keys. Signature and result are its."""
    shared = query.shape[2] == 1 and key.shape[1] < query.shape[1] and settings.get("position_bias") is None
    masked = attention_mask is not None and tuple(attention_mask.shape[1:3]) != (1, 1)
    if not shared or masked or not query.is_cpu:
        arguments = (query, key, value, attention_mask, dropout, scaling, is_causal)
        result: tuple[Tensor, None] = sdpa_attention_forward(module, *arguments, **settings)
        return result
    batch, heads, _, width = query.shape
    folded = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    attended = functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return attended.reshape(batch, 1, heads, -1), None


def fold_heads(model: PreTrainedModel) -> None:
    """Let the model attend with `attend`, if it would have with `sdpa` and asks transformers which function to use."""
    if model.config._attn_implementation == STANDARD and model._can_set_attn_implementation():
        model.set_attn_implementation(FOLDED)


def unfold_heads(model: PreTrainedModel) -> None:
    """The reverse."""
    if model.config._attn_implementation == FOLDED:
        model.set_attn_implementation(STANDARD)


AttentionInterface.register(FOLDED, attend)
AttentionMaskInterface.register(FOLDED, sdpa_mask)
