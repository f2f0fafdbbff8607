"""Error compensation, which GPTQ, OWQ, PB-LLM, BiLLM and QuIP share: H of every linear, its factor, the column loop.

With H = sum over tokens of x x^T and U upper triangular, U^T U = H^-1, rounding channel k to R_k moves the later ones
to

    W_j  <-  W_j - (W_k - R_k) U_kj / U_kk        for j > k

which makes up for the error of the layer's output best (GPTQ, arXiv 2210.17323, Eq. 3).
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ptq161.compensation import Rounding, inverse_factor, round_channels
from ptq161.errors import NonFiniteError
from ptq161.methods.baseline import BaselineTask, DenseWeight

BLOCK = 128  # channels rounded before their errors go to all later ones in one product; the authors' block size


@torch.no_grad()
def input_moments(task: BaselineTask) -> dict[str, Float[Tensor, "cols cols"]]:
    """H of each input, by the first linear that sees it: one pass through the original block.

    Raises NonFiniteError naming block and linear.
    """
    owners = {name: task.linears[name] for name in task.sharing()}
    moments = {
        name: torch.zeros(linear.in_features, linear.in_features, device=task.device) for name, linear in owners.items()
    }

    def add(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].float().flatten(0, -2)
            moments[name].addmm_(inputs.T, inputs)

        return hook

    task.run_watched([linear.register_forward_pre_hook(add(name)) for name, linear in owners.items()])
    for name, moment in moments.items():
        if not moment.isfinite().all():
            raise NonFiniteError(f"the input of {name} in block {task.index} is not finite on the calibration text")
    return moments


def each_linear(
    task: BaselineTask, quantize: Callable[[Float[Tensor, "rows cols"], Float[Tensor, "cols cols"]], DenseWeight]
) -> dict[str, DenseWeight]:
    """Quantize every linear by itself, from its weight (float32) and H."""
    moments = input_moments(task)
    return {
        name: quantize(linear.weight.detach().float(), moments[task.columns_from.get(name, name)])
        for name, linear in task.linears.items()
    }


def damped_factor(
    moments: Float[Tensor, "cols cols"], damping: float
) -> tuple[Float[Tensor, "cols cols"], Bool[Tensor, " cols"]]:
    """(U of the damped H, channels that are always zero), as in GPTQ's code.

    `damping` times the mean of the diagonal is added to it; a channel that is always zero gets 1 before that, and the
    caller sets its weights to zero.
    """
    raised = moments.clone()
    diagonal = raised.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    diagonal += damping * diagonal.mean()
    return inverse_factor(raised), dead


def compensate(
    weight: Float[Tensor, "rows cols"],
    factor: Float[Tensor, "cols cols"],
    fit: Callable[[int, Float[Tensor, "rows some"]], Rounding],
    count: int | None = None,
) -> Float[Tensor, "rows cols"]:
    """Round channel after channel, each error made up for by the channels that follow.

    fit: (first channel of a block, the block's weights as they are by then) -> how its channels are rounded.
    count: only the first so many channels are rounded; the others are returned as the errors have moved them.
    """
    left = weight.T.contiguous()  # (cols, rows): a channel is one stretch of memory
    end = len(left) if count is None else count
    for first in range(0, end, BLOCK):
        last = min(first + BLOCK, end)
        left[first:last] = round_channels(left, factor, first, last, fit(first, left[first:last].T))
    return left.T.contiguous()
