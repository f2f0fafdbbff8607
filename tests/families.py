"""One tiny configuration per supported model family, and a few that must be refused. Random weights, no downloads."""

from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 96  # tokens of the tiny tokenizer in conftest.py
HIDDEN, INNER, LAYERS = 32, 48, 2

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "max_position_embeddings": 128,
}
_GATED = _COMMON | {"intermediate_size": INNER, "num_key_value_heads": 2, "head_dim": 8}


def _falcon(**changes: object) -> PreTrainedConfig:
    return transformers.FalconConfig(**(_COMMON | {"alibi": False, "bias": False} | changes))


# Gemma-2, Gemma-3 and Mistral use a sliding window shorter than the sequences the tests run, so that both of their
# kinds of attention masks are replayed.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_GATED),
    "llama-tied": lambda: transformers.LlamaConfig(**_GATED, tie_word_embeddings=True, attention_bias=True),
    "mistral": lambda: transformers.MistralConfig(**_GATED, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**_GATED),
    "qwen3": lambda: transformers.Qwen3Config(**_GATED),
    "gemma2": lambda: transformers.Gemma2Config(**_GATED, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GATED, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: transformers.Phi3Config(**_GATED),
    "opt": lambda: transformers.OPTConfig(**_COMMON, ffn_dim=INNER, word_embed_proj_dim=HIDDEN),
    "falcon": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-multi-query": lambda: _falcon(new_decoder_architecture=False, multi_query=True, parallel_attn=True),
    "falcon-alibi": lambda: _falcon(
        new_decoder_architecture=False, multi_query=False, parallel_attn=False, alibi=True, bias=True
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_COMMON, intermediate_size=INNER),
}

REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2),
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration with seeded random weights, biases and norms included, in evaluation mode.

    Fresh models have zero biases and unit norms, which would hide a bias that got lost on the way.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
