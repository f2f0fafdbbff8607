"""Block-wise learning of the scaling factors (section 3.3): a distance, a two-branch objective, a loop.

One decoder block at a time, the signs and 4-bit codes stay fixed while row scales (alpha_s) and angular factors
(alpha_r1, alpha_r2) of all its linears are learned together, so that the block's output matches the original's.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ptq161.binarize import ColumnGroup, QuantizedWeight, group_values, reconstruct
from ptq161.blocks import BlockTask
from ptq161.config import Compute, Magnitude, QuantConfig
from ptq161.errors import NonFiniteError
from ptq161.machine import multiplies_bfloat16

# Below this the negative logarithm of the cosine stops growing; its gradient is then zero and the magnitude term leads.
SMALLEST_COSINE = 1e-4

OnStep = Callable[[int, int, float], None]  # step, steps, loss of the step


def block_distance(
    actual: Float[Tensor, "batch seq hidden"], wanted: Float[Tensor, "batch seq hidden"], config: QuantConfig
) -> Float[Tensor, ""]:
    """Magnitude plus direction error between two block outputs (Eq. 5 and 6).

    Cosine is per token, averaged, then clamped above zero before the log: with random signs an early step can go
    negative, and a NaN there is hard to trace back to its block. (The published code takes the absolute value, which
    would reward pointing the opposite way.)
    """
    error = actual - wanted
    magnitude = error.square().mean() if config.magnitude is Magnitude.MSE else error.norm(dim=-1).mean()
    if not config.angular:
        return magnitude
    cosine = nn.functional.cosine_similarity(actual, wanted, dim=-1).mean()
    return magnitude - cosine.clamp(min=SMALLEST_COSINE).log()


def objective(
    actual: Float[Tensor, "batch seq hidden"],
    full_out: Float[Tensor, "batch seq hidden"],
    local_out: Float[Tensor, "batch seq hidden"],
    config: QuantConfig,
) -> Float[Tensor, ""]:
    """The two-branch objective (Eq. 7): distance to the full-precision stream plus to the same-input output."""
    return block_distance(actual, full_out, config) + block_distance(actual, local_out, config)


@torch.no_grad()
def measure(
    task: BlockTask, weights: Mapping[str, QuantizedWeight], config: QuantConfig
) -> tuple[float, Float[Tensor, "samples seq hidden"]]:
    """The objective in float32, averaged over the whole calibration set, and the quantized stream out of the block."""
    dense = weight_arguments({name: reconstruct(weight) for name, weight in weights.items()})
    outputs = torch.empty_like(task.quantized_in)
    total = 0.0
    for index in range(len(outputs)):
        hidden, full_out, local_out = task.sample(index)
        out = task.call(task.block, hidden, dense)
        total += objective(out, full_out, local_out, config).item()
        outputs[index] = out[0]
    return total / len(outputs), outputs


def fit_block(
    task: BlockTask,
    weights: Mapping[str, QuantizedWeight],
    config: QuantConfig,
    generator: torch.Generator,
    on_step: OnStep = lambda step, steps, loss: None,
) -> dict[str, QuantizedWeight]:
    """Learn the factors of one block's binarized groups with AdamW, no weight decay (section 4.1).

    `config.batch_size` samples make one step, their gradients averaged; samples are reshuffled every epoch with
    `generator`. Matrix products may run in bfloat16 (`config.compute`); factors, loss and optimizer are float32.

    Raises NonFiniteError naming block, epoch and, if one is to blame, linear.
    """
    learned = {name: tuple(_learnable(group) for group in weight.groups) for name, weight in weights.items()}
    base = {name: reconstruct(weight).detach() for name, weight in weights.items()}
    groups = [group for linear in learned.values() for group in linear if group.row is not None]
    if not groups:  # every channel is salient: there is nothing to learn
        return dict(weights)
    scales = [group.scale for group in groups]
    angular = [factor for group in groups for factor in (group.row, group.col) if factor is not None]
    optimizer = torch.optim.AdamW(
        [{"params": scales, "lr": config.lr_scale}, {"params": angular, "lr": config.lr_angular}], weight_decay=0.0
    )
    device = base[next(iter(base))].device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=_use_bfloat16(config.compute, device))
    samples = len(task.quantized_in)
    steps = config.epochs * -(-samples // config.batch_size)
    step = 0
    for epoch in range(config.epochs):
        for batch in torch.randperm(samples, generator=generator).split(config.batch_size):
            optimizer.zero_grad()
            batch_loss = 0.0
            for index in batch.tolist():
                hidden, full_out, local_out = task.sample(index)
                dense = {name: _overlay(base[name], learned[name]) for name in base}
                with autocast:
                    out = task.call(task.block, hidden, weight_arguments(dense))
                loss = objective(out.float(), full_out, local_out, config) / len(batch)
                loss.backward()
                batch_loss += loss.item()
            _check_finite(batch_loss, task, learned, epoch, step)
            optimizer.step()
            step += 1
            on_step(step, steps, batch_loss)
    return {name: QuantizedWeight(tuple(_result(groups, weights[name]))) for name, groups in learned.items()}


def weight_arguments(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Linear name -> weight, as parameter name -> tensor for `torch.func.functional_call`."""
    return {f"{name}.weight": weight for name, weight in dense.items()}


def _learnable(group: ColumnGroup) -> ColumnGroup:
    """A copy whose factors are fresh leaves to optimize; groups without angular factors (4-bit) stay as they are.

    Codes become floating point once here instead of in every step.
    """
    if group.row is None:
        return group
    factors = {name: getattr(group, name) for name in ("scale", "row", "col")}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in factors.items() if value is not None}
    return replace(group, codes=group.codes.to(group.scale.dtype), **leaves)


def _overlay(base: Float[Tensor, "rows cols"], groups: tuple[ColumnGroup, ...]) -> Float[Tensor, "rows cols"]:
    """`base` with the columns of the learned groups computed anew."""
    for group in groups:
        if group.row is not None:
            base = base.index_copy(1, group.columns, group_values(group))
    return base


def _result(learned: tuple[ColumnGroup, ...], weight: QuantizedWeight) -> Iterator[ColumnGroup]:
    """The learned factors on the original integer codes, detached."""
    for group, original in zip(learned, weight.groups, strict=True):
        factors = {name: getattr(group, name) for name in ("scale", "row", "col")}
        detached: dict[str, Any] = {name: None if t is None else t.detach() for name, t in factors.items()}
        yield replace(original, **detached)


def _use_bfloat16(compute: Compute, device: torch.device) -> bool:
    if compute is Compute.AUTO:
        return multiplies_bfloat16(device)
    return compute is Compute.BFLOAT16


def _check_finite(
    loss: float, task: BlockTask, learned: Mapping[str, tuple[ColumnGroup, ...]], epoch: int, step: int
) -> None:
    """Raises NonFiniteError, naming the first linear whose factors are not finite.

    Their gradients would tell nothing: with such a loss every one of them is NaN.
    """
    if torch.tensor(loss).isfinite():
        return
    for name, groups in learned.items():
        tensors = [t for group in groups for t in (group.scale, group.row, group.col) if t is not None]
        if not all(t.isfinite().all() for t in tensors):
            culprit = f"factors of {name}"
            break
    else:
        culprit = "activations, not of any factor"
    raise NonFiniteError(
        f"loss is {loss} in block {task.index}, epoch {epoch}, step {step}, from the {culprit}; "
        "lower lr_scale and lr_angular (--set), or use --set compute=float32"
    )
