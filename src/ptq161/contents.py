"""What the safetensors files of a packed checkpoint hold, to the byte: computed beforehand, or read from headers.

`saving` writes these tensors into these files, `inspection` counts them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.errors import CheckpointError
from ptq161.folder import MAX_JSON_BYTES, path_problem
from ptq161.layout import ModelLayout
from ptq161.packing import TensorSpec

OTHER = "other"  # the part of a tensor that is not there because of quantization
METADATA = {"format": "pt"}

# In the order in which safetensors lays out the tensors of a file.
DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def stored_tensors(model: PreTrainedModel, layout: ModelLayout, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint in the order of the model: packed linears instead of their weights, ties once.

    dtype: of floating-point tensors that are not packed; None keeps each as it is. The model may be on meta.
    """
    state = model.state_dict()
    ignored = set(model._keys_to_ignore_on_save or ())
    for name, source in model.all_tied_weights_keys.items():
        if name in state and source in state and model.get_parameter(name) is model.get_parameter(source):
            ignored.add(name)
    tensors: dict[str, TensorSpec] = {}
    for name, tensor in state.items():
        linear, _, leaf = name.rpartition(".")
        if leaf == "weight" and linear in layout.linears:
            tensors |= {f"{linear}.{part}": spec for part, spec in layout.linears[linear].specs().items()}
        elif name not in ignored:
            tensors[name] = TensorSpec(tuple(tensor.shape), _stored_dtype(tensor, dtype), OTHER)
    return tensors


def _stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def into_shards(tensors: Mapping[str, TensorSpec], shard_bytes: int) -> list[list[str]]:
    """Tensor names by file: in order, at most `shard_bytes` of tensors a file unless one alone is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in tensors.items():
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return shards


def in_file_order(tensors: Mapping[str, TensorSpec]) -> list[str]:
    """Names in the order in which safetensors lays out tensors: by dtype, then by name."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}
    return sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))


def header(tensors: Mapping[str, TensorSpec]) -> bytes:
    """What is in front of the data of a safetensors file with these tensors: the length and the padded JSON header."""
    entries: dict[str, object] = {"__metadata__": METADATA}
    end = 0
    for name in in_file_order(tensors):
        spec, begin = tensors[name], end
        end += spec.nbytes
        entries[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text.ljust(-(-len(text) // 8) * 8)
    return len(padded).to_bytes(8, "little") + padded


def header_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    """The length of `header`."""
    return len(header(tensors))


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a safetensors header describes it; dtype by safetensors' own name."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, spec: TensorSpec) -> "StoredTensor":
        """How a tensor of this spec is described."""
        return cls(DTYPE_NAMES[spec.dtype], spec.shape, spec.nbytes)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def read_header(file: Path) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of a safetensors file and the bytes in front of their data, without reading the data.

    Raises CheckpointError for a link out of its folder, a header that makes no sense, or a file of another length.
    """
    refused = path_problem(file.parent, file.name)
    if refused is not None:
        raise CheckpointError(f"{file}: {refused}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= min(size, MAX_JSON_BYTES) else b""
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {name: _entry(entry) for name, entry in entries.items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: is not a readable safetensors file; run `ptq161 verify`") from error
    start = 8 + length
    expected = start + sum(tensor.nbytes for tensor in tensors.values())
    if size != expected:
        raise CheckpointError(f"{file}: has {size} bytes, its header makes {expected}; run `ptq161 verify`")
    return tensors, start


def _entry(entry: Mapping[str, Any]) -> StoredTensor:
    begin, end = map(int, entry["data_offsets"])
    return StoredTensor(str(entry["dtype"]), tuple(map(int, entry["shape"])), end - begin)
