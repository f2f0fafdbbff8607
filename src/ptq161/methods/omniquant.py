"""OmniQuant, weights only: the clipping of every group is learned, so that the block's output stays what it was.

Shao et al., arXiv 2308.13137; https://github.com/OpenGVLab/OmniQuant. The authors' settings for LLaMA at W2A16 in
groups: learnable weight clipping (two factors per group, sigmoid, started at 4), AdamW at 1e-2 without weight decay,
40 epochs of single samples in order, squared error to the original block's output on both streams (`--aug_loss`), the
block in half precision (here bfloat16, where the processor multiplies it). They leave the learnable equivalent
transformation off for LLaMA's weights, and it is not here. What has no group of full size is a smaller group.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ptq161.errors import NonFiniteError
from ptq161.machine import multiplies_bfloat16
from ptq161.methods.baseline import Baseline, BaselineTask, DenseWeight
from ptq161.methods.uniform import UniformGrid, grid_between, spans, uniform_bits

START = 4.0  # sigmoid(4) = 0.98 of the smallest and largest weight


@dataclass(frozen=True)
class OmniQuant(Baseline):
    """group: input channels that share a scale and a zero point; None: a whole row. lr: of the clipping factors."""

    bits: int
    group: int | None
    epochs: int = 40
    lr: float = 1e-2

    @property
    def claimed_bits(self) -> float:
        return self.bits

    def __call__(self, task: BaselineTask, generator: torch.Generator) -> dict[str, DenseWeight]:
        weights = {name: linear.weight.detach().float() for name, linear in task.linears.items()}
        factors = {name: self.start(weight) for name, weight in weights.items()}
        with torch.enable_grad():
            self.learn(task, weights, factors)
        with torch.no_grad():
            return {
                name: DenseWeight(
                    torch.cat(
                        [
                            grid.rounded(part)
                            for part, grid in clipped_grids(weight, factors[name], self.bits, self.group)
                        ],
                        dim=1,
                    ),
                    uniform_bits(weight.shape, self.bits, self.group),
                )
                for name, weight in weights.items()
            }

    def start(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "2 rows groups"]:
        """Clipping factors before the sigmoid: of the lower and of the upper end."""
        shape = (2, len(weight), len(spans(weight.shape[1], self.group)))
        return torch.full(shape, START, device=weight.device, requires_grad=True)

    def learn(self, task: BaselineTask, weights: dict[str, Tensor], factors: dict[str, Tensor]) -> None:
        """Learn the factors in place. Raises NonFiniteError naming block and epoch."""
        optimizer = torch.optim.AdamW(factors.values(), lr=self.lr, weight_decay=0.0)
        autocast = torch.autocast(task.device.type, torch.bfloat16, enabled=multiplies_bfloat16(task.device))
        with torch.no_grad():
            local = [task.call(task.block, sample[None].to(task.device)) for sample in task.inputs]
        for epoch in range(self.epochs):
            for sample, wanted, local_out in zip(task.inputs, task.wanted, local, strict=True):
                dense = {
                    f"{name}.weight": torch.cat(
                        [
                            straight_through(part, grid)
                            for part, grid in clipped_grids(weight, factors[name], self.bits, self.group)
                        ],
                        dim=1,
                    )
                    for name, weight in weights.items()
                }
                with autocast:
                    out = task.call(task.block, sample[None].to(task.device), dense).float()
                loss = (out - wanted[None].to(task.device)).square().mean() + (out - local_out).square().mean()
                if not math.isfinite(loss.item()):
                    raise NonFiniteError(f"omniquant's loss is {loss.item()} in block {task.index}, epoch {epoch}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def clipped_grids(
    weight: Float[Tensor, "rows cols"], factors: Float[Tensor, "2 rows groups"], bits: int, group: int | None
) -> Iterator[tuple[Float[Tensor, "rows gcols"], UniformGrid]]:
    """Each group with the grid between its clipped ends, which is differentiable in the factors."""
    low, high = factors.sigmoid()
    for index, span in enumerate(spans(weight.shape[1], group)):
        part = weight[:, span]
        lowest = part.amin(dim=1, keepdim=True) * low[:, index, None]
        highest = part.amax(dim=1, keepdim=True) * high[:, index, None]
        yield part, grid_between(lowest, highest, bits)


def straight_through(values: Float[Tensor, "rows some"], grid: UniformGrid) -> Float[Tensor, "rows some"]:
    """`grid.rounded`, with the gradient that there would be without rounding."""
    codes = (values / grid.scale + grid.zero).clamp(0, 2**grid.bits - 1)
    codes = codes + (codes.round() - codes).detach()
    return (codes - grid.zero) * grid.scale
