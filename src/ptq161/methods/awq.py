"""AWQ: channels with large activations are scaled up before rounding; then weights are clipped to what rounds best.

Lin et al., arXiv 2306.00978; https://github.com/mit-han-lab/llm-awq. The authors' settings: groups of 128, asymmetric
grids; scales s = (mean |x|)^ratio, the ratio out of 20 that changes the output of the module around the linears
least; clipping at 1.00, 0.95 ... 0.55 of a group's largest weight, by the error on 512 tokens, not for queries and
keys. It calibrates on the original model's hidden states.

W becomes Q(W diag(s)) diag(1/s). The authors fold 1/s into the norm or linear before, where there is one that permits
it, and leave other inputs unscaled. Here every input is scaled, and s is stored and counted: one float16 per channel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ptq161.binarize import stored
from ptq161.methods.baseline import Baseline, BaselineTask, DenseWeight, Stream
from ptq161.methods.rtn import nearest
from ptq161.methods.uniform import SCALE_BITS, grid_between, spans, uniform_bits

RATIOS = [step / 20 for step in range(20)]
SHRINKS = [1 - step / 20 for step in range(10)]
CLIPPING_TOKENS = 512
ROWS_AT_ONCE = 64  # of which products with every token are held while clipping is searched
NEVER_CLIPPED = ("q_", "k_", "query", "key", "qkv")  # in a linear's name


@dataclass(frozen=True)
class ModuleCall:
    """One call of the module around some linears: what it was given, and what it gave, for one sample."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass(frozen=True)
class Awq(Baseline):
    """group: input channels that share a scale and a zero point."""

    bits: int
    group: int = 128
    calibrates_on: ClassVar[Stream] = Stream.FULL

    @property
    def claimed_bits(self) -> float:
        return self.bits

    @torch.no_grad()
    def __call__(self, task: BaselineTask, generator: torch.Generator) -> dict[str, DenseWeight]:
        results = {}
        for owner, names in task.sharing().items():
            around = module_around(names)
            calls, inputs = record(task, around, task.linears[owner])
            weights = {name: task.linears[name].weight.detach().float() for name in names}
            scale = self.search_scale(task.block.get_submodule(around), around, weights, calls, inputs)
            for name, weight in weights.items():
                clipped = not any(part in name for part in NEVER_CLIPPED)
                results[name] = self.quantize(weight, scale, inputs, clipped=clipped, owner=name == owner)
        return {name: results[name] for name in task.linears}

    def search_scale(
        self,
        module: nn.Module,
        around: str,
        weights: dict[str, Tensor],
        calls: Sequence[ModuleCall],
        inputs: Float[Tensor, "tokens cols"],
    ) -> Float[Tensor, " cols"]:
        """The scale of the channels with which rounding `weights` changes the module's output least."""
        magnitude = inputs.abs().mean(dim=0)
        best, least = torch.ones_like(magnitude), float("inf")
        for ratio in RATIOS:
            scale = channel_scale(magnitude, ratio)
            rounded = {
                f"{name}.weight".removeprefix(f"{around}."): nearest(weight * scale, self.bits, self.group) / scale
                for name, weight in weights.items()
            }
            error = sum(module_error(module, rounded, call) for call in calls)
            if error < least:
                best, least = scale, error
        return best

    def quantize(
        self,
        weight: Float[Tensor, "rows cols"],
        scale: Float[Tensor, " cols"],
        inputs: Float[Tensor, "tokens cols"],
        *,
        clipped: bool,
        owner: bool,
    ) -> DenseWeight:
        """One linear with its channels scaled; of linears that share the scale, the owner counts its bits."""
        scaled = weight * scale
        if clipped:
            few = inputs[:: max(1, len(inputs) // CLIPPING_TOKENS)] / scale
            parts = [
                clipped_rounding(scaled[:, span], few[:, span], self.bits)
                for span in spans(weight.shape[1], self.group)
            ]
            rounded = torch.cat(parts, dim=1)
        else:
            rounded = nearest(scaled, self.bits, self.group)
        bits = uniform_bits(weight.shape, self.bits, self.group)
        if owner:
            bits["input_scales"] = len(scale) * SCALE_BITS
        return DenseWeight(rounded / scale, bits)


def module_around(names: Sequence[str]) -> str:
    """The innermost module that holds all these linears: of one linear, itself; of q, k and v, their attention."""
    if len(names) == 1:
        return names[0]
    steps = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))


def record(task: BaselineTask, around: str, linear: nn.Linear) -> tuple[list[ModuleCall], Float[Tensor, "tokens cols"]]:
    """Every call of a module of the block on the calibration samples, and what reaches the linear in it."""
    calls: list[ModuleCall] = []
    inputs: list[Tensor] = []

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(ModuleCall(args, kwargs, output[0] if isinstance(output, tuple) else output))

    def reached(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].float().flatten(0, -2))

    task.run_watched(
        [
            task.block.get_submodule(around).register_forward_hook(called, with_kwargs=True),
            linear.register_forward_pre_hook(reached),
        ]
    )
    return calls, torch.cat(inputs)


def module_error(module: nn.Module, weights: dict[str, Tensor], call: ModuleCall) -> float:
    """Mean squared change of the module's output with these weights."""
    output = torch.func.functional_call(module, weights, call.args, call.kwargs)
    actual: Tensor = output[0] if isinstance(output, tuple) else output
    return (actual - call.output).square().mean().item()


def channel_scale(magnitude: Float[Tensor, " cols"], ratio: float) -> Float[Tensor, " cols"]:
    """magnitude^ratio, brought to where its largest and smallest are each other's inverse; float16 values."""
    scale = magnitude.pow(ratio).clamp(min=1e-4)
    return stored(scale / (scale.max() * scale.min()).sqrt())


def clipped_rounding(
    part: Float[Tensor, "rows gcols"], inputs: Float[Tensor, "tokens gcols"], bits: int
) -> Float[Tensor, "rows gcols"]:
    """One group rounded, each row clipped to the share of its largest weight that changes its products least."""
    return torch.cat([_clipped_rows(rows, inputs, bits) for rows in part.split(ROWS_AT_ONCE)])


def _clipped_rows(
    part: Float[Tensor, "rows gcols"], inputs: Float[Tensor, "tokens gcols"], bits: int
) -> Float[Tensor, "rows gcols"]:
    largest = part.abs().amax(dim=1, keepdim=True)
    best = torch.empty_like(part)
    least = torch.full_like(largest, float("inf"))
    for shrink in SHRINKS:
        bound = largest * shrink
        clipped = part.clamp(-bound, bound)
        lowest, highest = clipped.amin(dim=1, keepdim=True), clipped.amax(dim=1, keepdim=True)
        rounded = grid_between(lowest, highest, bits).rounded(clipped)
        error = ((rounded - part) @ inputs.T).square().mean(dim=1, keepdim=True)
        best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best
