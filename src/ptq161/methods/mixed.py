"""Mixed widths on one decoder block: 1-bit, ternary and 4-bit channels, codes and scales learned together."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ptq161.binarize import QuantizedWeight, reconstruct
from ptq161.blocks import BlockTask, InputStats, second_moments
from ptq161.compensation import compensated_weight, damped, drift_correction
from ptq161.config import QuantConfig
from ptq161.errors import NonFiniteError
from ptq161.fit import OnStep, fit_latents, measure, weight_arguments
from ptq161.latent import LatentWeight
from ptq161.methods.result import BlockResult
from ptq161.mixed import group_columns, mixed_weight

ATTEMPTS = 3  # at learning a block, each with rates BACK_OFF times lower, before its start is kept
BACK_OFF = 4.0


def mixed(task: BlockTask, config: QuantConfig, on_step: OnStep) -> BlockResult:
    """Quantize one block; never worse than its start, plain rounding, by the objective on the calibration samples.

    Without epochs to learn in, codes are compensated instead; learning starts from plain rounding
    (docs/decisions/0005). Randomness depends on (config.seed, task.index) only, so blocks can resume.
    """
    start = _start(task)
    loss_first, outputs = measure(task, start, config)
    if compensates(config):
        latents = _compensated(task)
        weights = {name: weight.quantized() for name, weight in latents.items()}
        loss_last, compensated_outputs = measure(task, weights, config)
        if loss_last < loss_first:
            return BlockResult(weights, loss_first, loss_last, compensated_outputs, latents)
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


def compensates(config: QuantConfig) -> bool:
    """Whether codes are compensated, not learned: that takes the full-precision stream into each block, too."""
    return config.method == "mixed" and config.epochs == 0


def _start(task: BlockTask) -> dict[str, QuantizedWeight]:
    """Every linear rounded to its widths; linears that see the same input share their column groups."""
    columns = _shared_columns(task)
    start = {}
    for name, linear in task.linears.items():
        stats = task.stats[name]
        chosen = columns[task.columns_from.get(name, name)]
        start[name] = mixed_weight(linear.weight.detach(), chosen, task.widths[name], stats.square_sum / stats.tokens)
    return start


def _compensated(task: BlockTask) -> dict[str, LatentWeight]:
    """Compensated codes, input after input, each as the linears before it leave it once they are quantized."""
    latents: dict[str, LatentWeight] = {}
    for owner, columns in _shared_columns(task).items():
        dense = weight_arguments({name: reconstruct(weight.quantized()) for name, weight in latents.items()})
        moments, cross = second_moments(task, owner, dense)
        tokens = task.stats[owner].tokens
        correction, moments = drift_correction(moments, cross, tokens), damped(moments, tokens)
        for name in (name for name in task.linears if task.columns_from.get(name, name) == owner):
            weight = task.linears[name].weight.detach()
            latents[name] = compensated_weight(weight + weight @ correction, columns, task.widths[name], moments)
    return {name: latents[name] for name in task.linears}


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
