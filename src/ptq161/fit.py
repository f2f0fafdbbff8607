"""Block-wise learning (section 3.3): a distance, a two-branch objective, a loop; what is learned is one of two things.

One decoder block at a time, all its linears are learned together, so that the block's output matches the original's.
`fit_block` is the paper's: signs and 4-bit codes stay fixed, row scales (alpha_s) and angular factors (alpha_r1,
alpha_r2) are learned. `fit_latents` learns codes and row scales together (see `latent`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ptq161 import ranks
from ptq161.arithmetic import products_dtype, products_in
from ptq161.binarize import ColumnGroup, QuantizedWeight, group_values, reconstruct
from ptq161.blocks import BlockTask
from ptq161.config import Magnitude, QuantConfig
from ptq161.errors import NonFiniteError
from ptq161.latent import LatentWeight

# Below this the negative logarithm of the cosine stops growing; its gradient is then zero and the magnitude term leads.
SMALLEST_COSINE = 1e-4

# Keeps the relative error of a token whose wanted state is all zeros finite.
SMALLEST_ENERGY = 1e-6

# Share of its first value at which the cosine schedule of the learning rates ends.
LAST_RATE = 0.02

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
    if config.magnitude is Magnitude.RELATIVE:
        magnitude = (error.square().sum(dim=-1) / (wanted.square().sum(dim=-1) + SMALLEST_ENERGY)).mean()
    else:
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
    """The objective in float32, averaged over the samples of all ranks, and the quantized stream out of the block."""
    dense = weight_arguments({name: reconstruct(weight) for name, weight in weights.items()})
    outputs = task.space.like(task.quantized_in)
    loss = 0.0
    for index in range(len(outputs)):
        hidden, full_out, local_out = task.sample(index)
        out = task.call(task.block, hidden, dense)
        loss += objective(out, full_out, local_out, config).item()
        outputs[index] = out[0]
    loss, samples = ranks.total(loss, len(outputs))
    return loss / samples, outputs


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

    def dense() -> dict[str, Tensor]:
        return {name: _overlay(base[name], learned[name]) for name in base}

    factors = {
        name: [t for group in groups for t in (group.scale, group.row, group.col) if t is not None]
        for name, groups in learned.items()
    }
    _learn(task, config, dense, optimizer, factors, generator, on_step)
    return {name: QuantizedWeight(tuple(_result(groups, weights[name]))) for name, groups in learned.items()}


def fit_latents(
    task: BlockTask,
    latents: Mapping[str, LatentWeight],
    config: QuantConfig,
    generator: torch.Generator,
    on_step: OnStep = lambda step, steps, loss: None,
) -> None:
    """Learn codes and row scales of one block together, in place: AdamW, no weight decay, cosine schedule.

    Latents move by up to `config.lr_latent` times the mean magnitude of their matrix in a step, scales by up to
    `config.lr_scale` times themselves, so that one setting serves models of any scale.

    Raises NonFiniteError naming block, epoch and, if one is to blame, linear.
    """
    groups = latent_parameters(latents, config.lr_latent, config.lr_scale)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    device = next(iter(latents.values())).latent.device
    dtype = products_dtype(config.compute, device)

    def schedule(step: int, steps: int, loss: float) -> None:
        share = max(LAST_RATE, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        on_step(step, steps, loss)

    def dense() -> dict[str, Tensor]:
        return {name: weight.dense(dtype) for name, weight in latents.items()}

    factors = {name: [weight.latent, weight.gain] for name, weight in latents.items()}
    _learn(task, config, dense, optimizer, factors, generator, schedule)


def latent_parameters(latents: Mapping[str, LatentWeight], lr_latent: float, lr_scale: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: latents at a rate relative to their matrix, gains at `lr_scale`."""
    groups: list[dict[str, Any]] = [
        {"params": [weight.latent], "lr": lr_latent * weight.latent.detach().abs().mean().item()}
        for weight in latents.values()
    ]
    return [*groups, {"params": [weight.gain for weight in latents.values()], "lr": lr_scale}]


def _learn(
    task: BlockTask,
    config: QuantConfig,
    dense: Callable[[], dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    factors: Mapping[str, Sequence[Tensor]],
    generator: torch.Generator,
    on_step: OnStep,
) -> None:
    """`config.epochs` passes over the samples, shuffled anew for each; `dense` gives the weights of the moment.

    Every rank does its own samples of a batch. `factors`: linear -> what is learned of it, to name the culprit of a
    loss that is not finite.
    """
    learned = [factor for tensors in factors.values() for factor in tensors]
    device = learned[0].device
    dtype = products_dtype(config.compute, device)
    samples = int(ranks.total(len(task.quantized_in))[0])
    steps = config.epochs * -(-samples // config.batch_size)
    step = 0
    for epoch in range(config.epochs):
        for batch in shuffled_batches(samples, config.batch_size, generator):
            optimizer.zero_grad()
            batch_loss = 0.0
            for index in ranks.own(batch):
                hidden, full_out, local_out = task.sample(index)
                weights = weight_arguments(dense())
                with products_in(dtype, device):
                    out = task.call(task.block, hidden, weights)
                loss = objective(out.float(), full_out, local_out, config) / len(batch)
                loss.backward()
                batch_loss += loss.item()
            (batch_loss,) = ranks.total(batch_loss)
            ranks.add_gradients(learned)
            _check_finite(batch_loss, task, factors, epoch, step)
            optimizer.step()
            step += 1
            on_step(step, steps, batch_loss)


def shuffled_batches(samples: int, size: int, generator: torch.Generator) -> list[list[int]]:
    """All sample numbers in batches of `size`, shuffled; a last, smaller batch takes what does not divide.

    Place p of a batch takes only samples p, p + size, p + 2 size, ... So the ranks, whose samples are dealt out in the
    same way, have equally many in every whole batch if `size` is a multiple of their number.
    """
    places = [torch.arange(first, samples, size) for first in range(min(size, samples))]
    shuffled = [place[torch.randperm(len(place), generator=generator)].tolist() for place in places]
    return [[place[number] for place in shuffled if number < len(place)] for number in range(-(-samples // size))]


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


def _check_finite(loss: float, task: BlockTask, factors: Mapping[str, Sequence[Tensor]], epoch: int, step: int) -> None:
    """Raises NonFiniteError, naming the first linear whose factors are not finite.

    Their gradients would tell nothing: with such a loss every one of them is NaN.
    """
    if math.isfinite(loss):
        return
    damaged = (name for name, tensors in factors.items() if not all(t.isfinite().all() for t in tensors))
    name = next(damaged, None)
    culprit = "activations, not of any factor" if name is None else f"factors of {name}"
    raise NonFiniteError(
        f"loss is {loss} in block {task.index}, epoch {epoch}, step {step}, from the {culprit}; "
        "lower the learning rates (--set lr_scale, lr_angular, lr_latent), or use --set compute=float32"
    )
