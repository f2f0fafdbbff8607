"""A dense model whose weights are read when they are needed: modules on meta, tensors in files or in memory.

What computes is always a copy of some modules, filled with their weights (`block`, `outside`, `whole`), which its user
drops. Buffers that are in no checkpoint, such as rotary frequencies, are those of the model's own constructor.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.discovery import decoder_blocks

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: a safetensors file, its name in there, and the dtype it is wanted in (None: as stored)."""

    file: Path
    name: str
    dtype: torch.dtype | None = None


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in safetensors files, memory-mapped when asked for; of all files only the one used last is kept open."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = dict(places)
        self._opened: tuple[Path, Any] | None = None

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        if self._opened is None or self._opened[0] != place.file:
            self._opened = None  # unmapped before the next is mapped
            self._opened = place.file, safe_open(place.file, framework="pt")
        tensor: Tensor = self._opened[1].get_tensor(place.name)
        return tensor if place.dtype is None else tensor.to(place.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class DenseModel:
    """A model that can be quantized.

    skeleton: the model with every parameter on meta, in the dtype of its weight; it never computes itself.
    weights: name in the skeleton's state dict -> tensor, read anew each time it is asked for; not to be written to.
    dtype: what most weights are stored in (a GGUF: float32, as it is read).
    resident: all weights are in memory anyway.
    """

    skeleton: PreTrainedModel
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    resident: bool

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype | None = None) -> "DenseModel":
        """A model in memory, which is left alone."""
        parameters = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in model.parameters()}
        skeleton = copy.deepcopy(model, parameters).requires_grad_(False).eval()
        return cls(skeleton, model.state_dict(), dtype or model.dtype, resident=True)

    @cached_property
    def _found(self) -> tuple[str, nn.ModuleList]:
        return decoder_blocks(self.skeleton)

    @property
    def prefix(self) -> str:
        """Name of the list of decoder blocks, e.g. `model.layers`. Raises UnsupportedModel."""
        return self._found[0]

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks on meta. Raises UnsupportedModel."""
        return self._found[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored, shared ones once."""
        return sum(parameter.nbytes for parameter in self.skeleton.parameters())

    def block(self, index: int) -> nn.Module:
        """A copy of one decoder block with its weights as stored."""
        return self._filled(self.blocks[index], f"{self.prefix}.{index}.", lambda name: True)

    def outside(self, *, head: bool) -> PreTrainedModel:
        """A copy of the model with the weights that are in no decoder block, as stored; `head`: also its own head's."""
        last = self.skeleton.get_output_embeddings()
        shared = {id(p) for module in self.skeleton.modules() if module is not last for p in module.parameters(False)}
        own = set() if last is None else {id(p) for p in last.parameters()} - shared
        skipped = {name for name, p in self.skeleton.named_parameters(remove_duplicate=False) if id(p) in own}
        return self._filled(
            self.skeleton, "", lambda name: not name.startswith(f"{self.prefix}.") and (head or name not in skipped)
        )

    def whole(self) -> PreTrainedModel:
        """A copy of the model with all its weights as stored."""
        return self._filled(self.skeleton, "", lambda name: True)

    def _filled(self, module: _Module, prefix: str, wanted: Callable[[str], bool]) -> _Module:
        """A copy of a module with the wanted tensors, what was shared still shared; the others stay on meta."""
        shared = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
        read: dict[int | str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for name in module.state_dict():
            if wanted(name):
                key = shared.get(name, name)
                if key not in read:
                    tensor = self.weights[prefix + name]
                    read[key] = nn.Parameter(tensor, requires_grad=False) if name in shared else tensor
                tensors[name] = read[key]
        filled = copy.deepcopy(module)
        filled.load_state_dict(tensors, strict=False, assign=True)
        return filled
