"""PTQ1.61 on one decoder block: structured mask, binarization, learned factors (sections 3.2 and 3.3)."""

import torch
from jaxtyping import Bool
from torch import Tensor

from ptq161.binarize import FOUR_BIT, as_stored, quantize_weight, salient_columns
from ptq161.blocks import BlockTask, InputStats
from ptq161.config import QuantConfig, Statistic
from ptq161.fit import OnStep, fit_block, measure
from ptq161.methods.result import BlockResult


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
    weights = {name: as_stored(weight) for name, weight in fitted.items()}
    return BlockResult(weights, loss_first, *measure(task, weights, config))


def block_masks(task: BlockTask, statistic: Statistic) -> dict[str, Bool[Tensor, " cols"]]:
    """The structured mask of every linear; linears that see the same input share one."""
    masks: dict[str, Bool[Tensor, " cols"]] = {}
    for name in task.linears:
        owner = task.columns_from.get(name)
        if owner is not None:
            masks[name] = masks[owner]
        else:
            count = dict(task.widths[name]).get(FOUR_BIT.name, 0)
            masks[name] = salient_columns(channel_importance(task.stats[name], statistic), count)
    return masks


def channel_importance(stats: InputStats, statistic: Statistic) -> Tensor:
    """Magnitude of each input channel over the calibration tokens (section 3.2), shape (cols,)."""
    return stats.absmax if statistic is Statistic.ABSMAX else stats.abs_sum / stats.tokens
