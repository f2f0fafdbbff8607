"""SmoothQuant at W4A4: outliers of the activations are moved into the weights, then both are rounded.

Xiao et al., arXiv 2211.10438; https://github.com/mit-han-lab/smoothquant. The authors' settings: migration strength
0.5; inputs that come from a norm are divided by s_j = max|x_j|^0.5 / max|W_j|^0.5, the maximum over all linears that
see them (the norm absorbs it, so it takes no bits); symmetric absmax grids, weights per row, activations per token as
they come. It calibrates on the original model's hidden states. Products inside attention stay exact.

W becomes Q(W diag(s)) diag(1/s), and the input Q(x / s) s.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ptq161.binarize import stored
from ptq161.blocks import watch_inputs
from ptq161.methods.baseline import Baseline, BaselineTask, DenseWeight, Stream
from ptq161.methods.uniform import SCALE_BITS

SMALLEST = 1e-5  # of any scale


@dataclass(frozen=True)
class SmoothQuant(Baseline):
    """bits: of weights and of activations. strength: 0 leaves all outliers in the activations, 1 moves them all."""

    bits: int = 4
    strength: float = 0.5
    calibrates_on: ClassVar[Stream] = Stream.FULL

    @property
    def claimed_bits(self) -> float:
        return self.bits

    @torch.no_grad()
    def __call__(self, task: BaselineTask, generator: torch.Generator) -> dict[str, DenseWeight]:
        absmax, from_norm = inspect_inputs(task)
        results = {}
        for owner, names in task.sharing().items():
            weights = {name: task.linears[name].weight.detach().float() for name in names}
            scale = torch.ones_like(absmax[owner])
            if owner in from_norm:
                largest = torch.stack([weight.abs().amax(dim=0) for weight in weights.values()]).amax(dim=0)
                scale = smoothing(absmax[owner], largest, self.strength)
            for name, weight in weights.items():
                rounded = stored_rows(weight * scale, self.bits) / scale
                bits = {"codes": weight.numel() * self.bits, "scales": len(weight) * SCALE_BITS}
                results[name] = DenseWeight(rounded, bits, partial(round_tokens, scale=scale, bits=self.bits))
        return {name: results[name] for name in task.linears}


def inspect_inputs(task: BaselineTask) -> tuple[dict[str, Float[Tensor, " cols"]], set[str]]:
    """(largest magnitude of every channel of each linear's input, linears whose input a norm hands them as it is)."""
    normed: list[Any] = []  # by the norms, for the sample at hand
    from_norm: set[str] = set()

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        normed.clear()

    def gave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        normed.append(output)

    def reached(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if any(args[0] is output for output in normed):
            from_norm.add(name)

    norms = [module for module in task.block.modules() if _is_norm(module)]
    handles = [task.block.register_forward_pre_hook(begin)]
    handles += [module.register_forward_hook(gave) for module in norms]
    handles += [m.register_forward_pre_hook(partial(reached, name)) for name, m in task.linears.items()]
    with watch_inputs(task.linears) as stats:
        task.run_watched(handles)
    return {name: stat.absmax for name, stat in stats.items()}, from_norm


def _is_norm(module: nn.Module) -> bool:
    """Whether it scales channels: a module of its own with a weight vector."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1


def smoothing(
    absmax: Float[Tensor, " cols"], largest: Float[Tensor, " cols"], strength: float
) -> Float[Tensor, " cols"]:
    """max|x_j|^strength / max|W_j|^(1 - strength)."""
    return (absmax.clamp(min=SMALLEST) ** strength / largest.clamp(min=SMALLEST) ** (1 - strength)).clamp(min=SMALLEST)


def stored_rows(weight: Float[Tensor, "rows cols"], bits: int) -> Float[Tensor, "rows cols"]:
    """Each row on its symmetric grid, whose scale is float16."""
    scale = stored(weight.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) / (2 ** (bits - 1) - 1))
    return symmetric(weight, scale, bits)


def round_tokens(inputs: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The input that the rounded weights see, (..., cols): each token on its own grid, smoothed while rounded."""
    smooth = inputs / scale
    step = smooth.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / (2 ** (bits - 1) - 1)
    rounded: Tensor = symmetric(smooth, step, bits) * scale
    return rounded


def symmetric(values: Float[Tensor, "*batch some"], scale: Float[Tensor, "*batch 1"], bits: int) -> Tensor:
    """The nearest of the 2^bits - 1 multiples of the scale around zero."""
    highest = 2 ** (bits - 1) - 1
    return (values / scale).round().clamp(-highest, highest) * scale
