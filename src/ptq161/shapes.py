"""Well-known models by the shapes of their layers, and their size in several formats (after the paper's Table 13)."""

import copy
from collections.abc import Callable
from functools import cache

import torch
from transformers import LlamaConfig, PreTrainedConfig

from ptq161.allocation import LAYOUTS
from ptq161.config import PRESETS
from ptq161.discovery import config_shapes
from ptq161.inspection import predict_config
from ptq161.methods.billm import billm_bits
from ptq161.methods.hessian import BLOCK
from ptq161.methods.pb_llm import PbLlm, pb_llm_bits
from ptq161.methods.uniform import spans, uniform_bits


def _llama(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int) -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "LLaMA-7B, LLaMA-2-7B": lambda: _llama(4096, 11008, 32, 32, 32, 32000),
    "LLaMA-13B, LLaMA-2-13B": lambda: _llama(5120, 13824, 40, 40, 40, 32000),
    "LLaMA-3-8B": lambda: _llama(4096, 14336, 32, 32, 8, 128256),
}


def memory_table() -> dict[str, dict[str, int]]:
    """Model -> format -> bytes of the whole model: linears of the blocks in the format, the rest at 16 bits."""
    return {name: format_bytes(config()) for name, config in MODELS.items()}


def format_bytes(config: PreTrainedConfig) -> dict[str, int]:
    """Bytes of a model of this configuration by format; files' headers apart. Its blocks must be alike.

    Worked out for one block and for two: building all of them takes seconds.
    """
    one, two = (_format_bytes(config, blocks) for blocks in (1, 2))
    return {name: size + (config.num_hidden_layers - 1) * (two[name] - size) for name, size in one.items()}


def _format_bytes(whole: PreTrainedConfig, blocks: int) -> dict[str, int]:
    config = copy.copy(whole)
    config.num_hidden_layers = blocks
    linears = config_shapes(config)
    shapes = [(shape.rows, shape.cols) for shape in linears.values()]
    paper, fast = PRESETS["paper"].quant, PRESETS["fast"].quant
    predicted = predict_config(config, paper.method, paper)
    bits = {
        "16 bits": sum(16 * rows * cols for rows, cols in shapes),
        "GPTQ w2g128": sum(sum(uniform_bits(shape, 2, 128).values()) for shape in shapes),
        "BiLLM": sum(map(_billm, shapes)),
        "PB-LLM": sum(map(_pb_llm, shapes)),
        "PTQ1.61": 8 * sum(predicted["parts"].values()),
        "mixed": 8 * sum(LAYOUTS[fast.method](linears, fast, None).parts().values()),
    }
    return {name: total // 8 + predicted["other_bytes"] for name, total in bits.items()}


@cache
def _billm(shape: tuple[int, int]) -> int:
    """The same for any salient columns: what they cost more in codes they save in the bitmap."""
    rows, cols = shape
    groups = [torch.zeros(span.stop - span.start, dtype=torch.bool) for span in spans(cols, BLOCK)]
    return sum(billm_bits(rows, groups).values())


@cache
def _pb_llm(shape: tuple[int, int]) -> int:
    method = PbLlm()
    rows, cols = shape
    low = torch.zeros(rows * cols, dtype=torch.bool)
    low[: int(method.low_fraction * rows * cols)] = True
    return sum(pb_llm_bits(low.view(rows, cols), method.high_bits).values())
