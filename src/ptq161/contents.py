"""What the safetensors files of a packed checkpoint hold, to the byte: computed beforehand, or read from headers.

`saving` writes these tensors into these files, `inspection` counts them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.errors import CheckpointError
from ptq161.folder import CONFIG, path_problem
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
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MAX_TABLE_BYTES = 2**28


def stored_tensors(model: PreTrainedModel, layout: ModelLayout, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint in the order of the model: packed modules instead of their weights, ties once.

    dtype: of floating-point tensors that are not packed; None keeps each as it is. The model may be on meta.
    """
    state, packed = model.state_dict(), layout.modules
    ignored = set(model._keys_to_ignore_on_save or ())
    for name, source in model.all_tied_weights_keys.items():
        if name in state and source in state and model.get_parameter(name) is model.get_parameter(source):
            ignored.add(name)
    tensors: dict[str, TensorSpec] = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in packed:
            tensors |= {f"{module}.{part}": spec for part, spec in packed[module].specs().items()}
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

    Raises CheckpointError for a link out of its folder, another kind of file, a header that makes no sense, or a file
    of another length than its header says.
    """
    refused = path_problem(file.parent, file.name)
    if refused is None and file.suffix != ".safetensors":
        refused = "is not safetensors; packed weights are read from no other kind of file"
    if refused is not None:
        raise CheckpointError(f"{file}: {refused}")
    tensors = {}
    try:
        with safe_open(file, framework="pt") as handle:  # checks lengths, offsets and shapes against each other
            for name in handle.keys():  # noqa: SIM118
                header = handle.get_slice(name)
                dtype, shape = header.get_dtype(), tuple(header.get_shape())
                if dtype not in TORCH_DTYPES:
                    raise CheckpointError(
                        f"{file}: tensor {name} is {dtype}, expected one of {', '.join(TORCH_DTYPES)}"
                    )
                tensors[name] = StoredTensor(dtype, shape, prod(shape) * TORCH_DTYPES[dtype].itemsize)
        return tensors, file.stat().st_size - sum(tensor.nbytes for tensor in tensors.values())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: is not a readable safetensors file: {error}; run `ptq161 verify`") from error


def headers_for(model: PreTrainedModel, layout: ModelLayout, files: Iterable[Path]) -> dict[str, Path]:
    """Tensor -> its file, once these files hold exactly the tensors of an empty packed model, by their headers alone.

    transformers compares no shapes for a quantized model, starts missing tensors at random, and leaves out what it does
    not know. Raises CheckpointError.
    """
    state, packed = model.state_dict(), layout.tensor_specs()
    file_of: dict[str, Path] = {}
    for file in files:
        for name, found in read_header(file)[0].items():
            if name in file_of:
                raise CheckpointError(f"{file}: tensor {name} is in {file_of[name].name}, too")
            file_of[name] = file
            if name not in state:
                raise CheckpointError(f"{file}: tensor {name} does not belong to this model")
            expected, stored = state[name], TORCH_DTYPES[found.dtype]
            if found.shape != tuple(expected.shape):
                raise CheckpointError(f"{file}: tensor {name} is {list(found.shape)}, expected {list(expected.shape)}")
            exact = name in packed or not expected.is_floating_point()
            if stored != expected.dtype if exact else not stored.is_floating_point:
                raise CheckpointError(f"{file}: tensor {name} is {found}, expected {expected.dtype}")
    ties = model.all_tied_weights_keys
    there = file_of.keys() | {name for pair in ties.items() if not file_of.keys().isdisjoint(pair) for name in pair}
    there |= set(model._keys_to_ignore_on_save or ())
    for name in sorted(state.keys() - there if file_of else ()):
        raise CheckpointError(f"{next(iter(file_of.values())).name}: tensor {name} is missing; run `ptq161 verify`")
    _check_buffers(model, state)
    return file_of


def _check_buffers(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Refuse tables that the model computes for itself, such as rotary frequencies, if they are of absurd size."""
    for name, buffer in model.named_buffers():
        if name not in state and buffer.nbytes > MAX_TABLE_BYTES:
            raise CheckpointError(f"{CONFIG}: makes {name} a table of {buffer.nbytes} bytes, more than any model has")
