"""What a baseline takes and gives: one decoder block in, dense weights and their honest bits out.

Baselines are compared with, never saved: they have no packed format, so each says itself what storing its result takes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ptq161.blocks import BlockCall


class Stream(StrEnum):
    """Which hidden states a baseline calibrates on."""

    FULL = "full"  # those of the original model
    QUANTIZED = "quantized"  # those that the blocks quantized so far give


@dataclass(frozen=True)
class BaselineTask:
    """All that a baseline may see of one decoder block, its weights still the original ones.

    linears: name inside the block -> module, in order of definition.
    columns_from: linear -> earlier linear that sees the same input, where there is one.
    inputs: hidden states into the block, of the stream that the baseline calibrates on, float32.
    wanted: what the original block makes of the original model's hidden states, float32.
    """

    index: int
    block: nn.Module
    linears: dict[str, nn.Linear]
    columns_from: dict[str, str]
    inputs: Float[Tensor, "samples seq hidden"]
    wanted: Float[Tensor, "samples seq hidden"]
    call: BlockCall

    @property
    def device(self) -> torch.device:
        return next(self.block.parameters()).device

    def sharing(self) -> dict[str, list[str]]:
        """First linear of each shared input -> all linears that see it, itself included."""
        shared: dict[str, list[str]] = {}
        for name in self.linears:
            shared.setdefault(self.columns_from.get(name, name), []).append(name)
        return shared

    def run_watched(self, hooks: Sequence[RemovableHandle]) -> None:
        """Run every sample through the original block; the hooks that watch it are removed afterwards."""
        try:
            for sample in self.inputs:
                self.call(self.block, sample[None].to(self.device))
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class DenseWeight:
    """What a baseline made of one linear.

    weight: the dequantized weight, (rows, cols), to be multiplied with the linear's usual input.
    bits: part (codes, scales, ...) -> bits that storing it takes; everything the dequantized weight depends on.
    round_input: what happens to the input, (..., cols) -> (..., cols), where activations are quantized too.
    """

    weight: Float[Tensor, "rows cols"]
    bits: dict[str, int]
    round_input: Callable[[Tensor], Tensor] | None = None


class Baseline(ABC):
    """A method with its settings: subclasses are frozen dataclasses, one field per setting of the authors."""

    calibrates_on: ClassVar[Stream] = Stream.QUANTIZED

    @property
    @abstractmethod
    def claimed_bits(self) -> float:
        """Bits per weight as its authors count them."""

    @abstractmethod
    def __call__(self, task: BaselineTask, generator: torch.Generator) -> dict[str, DenseWeight]:
        """Quantize one block: an entry for every linear. `generator` is all the randomness there is."""
