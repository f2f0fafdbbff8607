"""A LLaMA of transformers as a GGUF file that llama.cpp reads, and its weights back from one.

llama.cpp's types below four bits have blocks of 256 input channels; a linear of another width silently gets a type of
four bits or more. So the widths here can be padded with zeros to multiples of 256 in a way that leaves the function as
it is: more hidden channels that are always zero, more heads whose values are zero, more inner channels that are zero.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from transformers import LlamaForCausalLM, PreTrainedModel

from ptq161.errors import InputError, UnsupportedModel

BLOCK = 256  # input channels that share a scale of scales in llama.cpp's low-bit types


@dataclass(frozen=True)
class Widths:
    """The widths of a LLaMA: `heads` and `kv_heads` of `head` channels each."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Widths":
        """Raises UnsupportedModel for what the export has no words for."""
        if type(model) is not LlamaForCausalLM:
            raise UnsupportedModel(f"llama.cpp is tried on LlamaForCausalLM only; this is a {type(model).__name__}")
        config: Any = model.config
        if config.attention_bias or config.mlp_bias or config.rope_parameters["rope_type"] != "default":
            raise UnsupportedModel("llama.cpp is tried on LLaMA without biases and with plain rotary positions only")
        if config.hidden_act != "silu":
            raise UnsupportedModel(f"llama.cpp is tried on LLaMA with silu only, not {config.hidden_act}")
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )

    @property
    def padded(self) -> "Widths":
        """The next widths that llama.cpp's blocks fill; heads are added in whole groups that share keys and values."""
        group = self.heads // self.kv_heads
        step = BLOCK // math.gcd(BLOCK, group * self.head)  # so many groups fill whole blocks
        kv_heads = _up(self.kv_heads, step)
        return replace(
            self,
            hidden=_up(self.hidden, BLOCK),
            inner=_up(self.inner, BLOCK),
            heads=kv_heads * group,
            kv_heads=kv_heads,
        )

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Last part of a linear's name -> (rows, cols)."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.inner, self.hidden),
            "up_proj": (self.inner, self.hidden),
            "down_proj": (self.hidden, self.inner),
        }

    def rotary_heads(self, part: str) -> int | None:
        """How many heads' rows are rotated; None for a linear without positions."""
        return {"q_proj": self.heads, "k_proj": self.kv_heads}.get(part)


@dataclass(frozen=True)
class Coded:
    """A linear's weight in one of llama.cpp's types: rows of bytes."""

    rows: np.ndarray[Any, np.dtype[np.uint8]]
    type: gguf.GGMLQuantizationType


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def names(model: PreTrainedModel) -> dict[str, str]:
    """Name in transformers -> name in the GGUF file, of every tensor that is stored."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    found = {name: table.get_name(name, try_suffixes=(".weight",)) for name in model.state_dict()}
    if model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    return {name: known for name, known in found.items() if known is not None}


def padded(name: str, tensor: Float[Tensor, "..."], widths: Widths, wide: Widths) -> Float[Tensor, "..."]:
    """One tensor as the GGUF file has it: zeros added up to `wide`, rows of rotated heads in llama.cpp's order."""
    part = name.split(".")[-2]
    if part in widths.shapes():
        rows, cols = wide.shapes()[part]
        tensor = pad(tensor, (0, cols - tensor.shape[1], 0, rows - tensor.shape[0]))
        heads = wide.rotary_heads(part)
        return tensor if heads is None else _swapped(tensor, heads, 2)
    tensor = pad(tensor, (0, wide.hidden - widths.hidden))
    # A norm divides by the root of a mean, which the zeros make smaller. Its epsilon is made smaller alike.
    return tensor * math.sqrt(widths.hidden / wide.hidden) if tensor.ndim == 1 else tensor


def unpadded(name: str, tensor: Float[Tensor, "rows cols"], widths: Widths, wide: Widths) -> Float[Tensor, "r c"]:
    """One linear's weight as transformers has it, from what the GGUF file has."""
    part = name.split(".")[-2]
    rows, cols = widths.shapes()[part]
    heads = wide.rotary_heads(part)
    return (tensor if heads is None else _swapped(tensor, heads, wide.head // 2))[:rows, :cols]


def _swapped(weight: Float[Tensor, "rows cols"], heads: int, outer: int) -> Float[Tensor, "rows cols"]:
    """Each head's rows as a table of `outer` lines, read column by column: llama.cpp rotates neighbours, not halves."""
    rows, cols = weight.shape
    return weight.view(heads, outer, rows // heads // outer, cols).transpose(1, 2).reshape(rows, cols)


def write_gguf(model: PreTrainedModel, path: Path, widths: Widths, wide: Widths, coded: Mapping[str, Coded]) -> None:
    """Write the model without its tokenizer: to be measured, with token ids.

    coded: name in transformers -> what stands for the linear's weight, already padded. Embedding and head are stored in
    float16 where there is any, all else in float32. Raises InputError if the file cannot be written.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(wide.hidden)
    writer.add_feed_forward_length(wide.inner)
    writer.add_head_count(wide.heads)
    writer.add_head_count_kv(wide.kv_heads)
    writer.add_key_length(wide.head)
    writer.add_value_length(wide.head)
    writer.add_rope_dimension_count(wide.head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps * widths.hidden / wide.hidden)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    weights = model.state_dict()
    for name, known in names(model).items():
        if name in coded:
            writer.add_tensor(known, coded[name].rows, raw_dtype=coded[name].type)
            continue
        tensor = padded(name, weights[name].float().cpu(), widths, wide)
        writer.add_tensor(known, (tensor.half() if coded and tensor.ndim == 2 else tensor).contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder with more room") from error
    finally:
        writer.close()


def read_linears(path: Path, model: PreTrainedModel, widths: Widths, wide: Widths) -> dict[str, Tensor]:
    """Name in transformers -> weight (rows, cols) in float32, of every linear of the blocks, as the file has it."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for name, known in names(model).items():
        if name.split(".")[-2] in widths.shapes():
            values = gguf.quants.dequantize(stored[known].data, stored[known].tensor_type)
            found[name] = unpadded(name, torch.tensor(values), widths, wide)
    return found
