"""Mixed widths on one decoder block: 1-bit, ternary and 4-bit channels, codes and scales learned together."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ptq161.binarize import QuantizedWeight, reconstruct
from ptq161.blocks import BlockTask, InputStats, second_moments
from ptq161.compensation import compensated_weight, damped, damping_for
from ptq161.config import QuantConfig
from ptq161.errors import NonFiniteError
from ptq161.fit import OnStep, fit_latents, measure, weight_arguments
from ptq161.latent import LatentWeight
from ptq161.methods.result import BlockResult
from ptq161.mixed import group_columns, mixed_weight

ATTEMPTS = 3  # at learning a block, each with rates BACK_OFF times lower, before its start is kept
BACK_OFF = 4.0


def mixed(task: BlockTask, config: QuantConfig, on_step: OnStep) -> BlockResult:
    """Quantize one block; never worse than its start by the objective on the calibration samples.

    Randomness depends on (config.seed, task.index) only, so blocks can resume.
    """
    start = _start(task) if config.epochs else _compensated_start(task)
    loss_first, outputs = measure(task, start, config)
    learn = config
    for _ in range(ATTEMPTS if config.epochs else 0):
        latents = {name: LatentWeight.of(linear.weight, start[name]) for name, linear in task.linears.items()}
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + task.index)
        try:
            fit_latents(task, latents, learn, generator, on_step)
            weights = {name: weight.quantized() for name, weight in latents.items()}
            loss_last, learned_outputs = measure(task, weights, config)
        except NonFiniteError:
            loss_last = math.inf
        if loss_last < loss_first:
            return BlockResult(weights, loss_first, loss_last, learned_outputs, latents)
        learn = replace(learn, lr_latent=learn.lr_latent / BACK_OFF, lr_scale=learn.lr_scale / BACK_OFF)
    latents = {name: LatentWeight.of(linear.weight, start[name]) for name, linear in task.linears.items()}
    return BlockResult(start, loss_first, loss_first, outputs, latents)


def _start(task: BlockTask) -> dict[str, QuantizedWeight]:
    """Every linear rounded to its widths; linears that see the same input share their column groups."""
    columns = _shared_columns(task)
    start = {}
    for name, linear in task.linears.items():
        stats = task.stats[name]
        chosen = columns[task.columns_from.get(name, name)]
        start[name] = mixed_weight(linear.weight.detach(), chosen, task.widths[name], stats.square_sum / stats.tokens)
    return start


def _compensated_start(task: BlockTask) -> dict[str, QuantizedWeight]:
    """The same with compensated codes, each shared input as it is once the linears before it are quantized.

    Nothing is learned from here: learning would undo it (docs/decisions/0005).
    """
    start: dict[str, QuantizedWeight] = {}
    for owner, columns in _shared_columns(task).items():
        names = [name for name in task.linears if task.columns_from.get(name, name) == owner]
        dense = weight_arguments({name: reconstruct(weight) for name, weight in start.items()})
        moments = second_moments(task, owner, dense)
        moments = damped(moments, damping_for(len(moments), task.stats[owner].tokens))
        # Rows do not depend on each other: the linears that share the input are rounded as one.
        weights = [task.linears[name].weight.detach() for name in names]
        rounded = compensated_weight(torch.cat(weights), columns, task.widths[owner], moments)
        start |= zip(names, _split_rows(rounded, [len(weight) for weight in weights]), strict=True)
    return {name: start[name] for name in task.linears}


def _split_rows(weight: QuantizedWeight, sizes: list[int]) -> list[QuantizedWeight]:
    """The linears whose rows lie below one another in `weight`."""
    split = [
        [
            replace(group, codes=codes, scale=scale)
            for codes, scale in zip(group.codes.split(sizes), group.scale.split(sizes), strict=True)
        ]
        for group in weight.groups
    ]
    return [QuantizedWeight(groups) for groups in zip(*split, strict=True)]


def _shared_columns(task: BlockTask) -> dict[str, list[Tensor]]:
    """First linear of each shared input -> channels of each column group."""
    importance = shared_importance(task.linears, task.stats, task.columns_from)
    return {owner: group_columns(harm, task.widths[owner]) for owner, harm in importance.items()}


def shared_importance(
    linears: Mapping[str, nn.Linear], stats: Mapping[str, InputStats], columns_from: Mapping[str, str]
) -> dict[str, Float[Tensor, " cols"]]:
    """First linear of each shared input -> importance of its channels, which decides who gets the wider codes.

    It is the squared input summed over the calibration tokens, times the squared weights of the channel's columns.
    """
    importance: dict[str, Tensor] = {}
    for name, linear in linears.items():
        owner = columns_from.get(name, name)
        harm = stats[name].square_sum * linear.weight.detach().float().square().sum(dim=0)
        importance[owner] = importance[owner] + harm if owner in importance else harm
    return importance
