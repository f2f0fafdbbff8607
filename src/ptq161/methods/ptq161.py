"""PTQ1.61 on one decoder block: structured mask, binarization, learned factors (sections 3.2 and 3.3)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from ptq161.binarize import QuantizedWeight, as_stored, quantize_weight, salient_columns, salient_count
from ptq161.blocks import BlockTask, InputStats
from ptq161.config import QuantConfig, Statistic
from ptq161.fit import OnStep, fit_block, measure


@dataclass(frozen=True)
class BlockResult:
    """What a method made of a block: weights exactly as they will be stored, and the objective it started from."""

    weights: dict[str, QuantizedWeight]
    loss_first: float


Method = Callable[[BlockTask, QuantConfig, OnStep], BlockResult]


def ptq161(task: BlockTask, config: QuantConfig, on_step: OnStep) -> BlockResult:
    """Quantize one block by the paper. Randomness depends on (config.seed, task.index) only, so blocks can resume."""
    masks = block_masks(task, config.statistic)
    initial = {
        name: quantize_weight(
            linear.weight.detach(), masks[name], salient_range=config.salient_range, row_mean=config.row_mean
        )
        for name, linear in task.linears.items()
    }
    loss_first, _ = measure(task, initial, config)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + task.index)
    fitted = fit_block(task, initial, config, generator, on_step) if config.epochs else initial
    return BlockResult({name: as_stored(weight) for name, weight in fitted.items()}, loss_first)


def block_masks(task: BlockTask, statistic: Statistic) -> dict[str, Bool[Tensor, " cols"]]:
    """The structured mask of every linear; linears that see the same input share one."""
    masks: dict[str, Bool[Tensor, " cols"]] = {}
    for name, linear in task.linears.items():
        owner = task.columns_from.get(name)
        if owner is not None:
            masks[name] = masks[owner]
        else:
            count = salient_count(task.salient_ratio, linear.in_features)
            masks[name] = salient_columns(channel_importance(task.stats[name], statistic), count)
    return masks


def channel_importance(stats: InputStats, statistic: Statistic) -> Tensor:
    """Magnitude of each input channel over the calibration tokens (section 3.2), shape (cols,)."""
    return stats.absmax if statistic is Statistic.ABSMAX else stats.abs_sum / stats.tokens
