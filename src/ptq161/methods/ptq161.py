"""PTQ1.61 on one decoder block: structured mask, binarization, learned factors (sections 3.2 and 3.3)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
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
    owners = {name: task.columns_from.get(name, name) for name in task.linears}
    masks: dict[str, Bool[Tensor, " cols"]] = {}
    for name, owner in owners.items():
        if owner not in masks:
            count = dict(task.widths[owner]).get(FOUR_BIT.name, 0)
            fed = [task.linears[other].weight.detach() for other in owners if owners[other] == owner]
            masks[owner] = salient_columns(channel_importance(task.stats[owner], fed, statistic), count)
        masks[name] = masks[owner]
    return masks


def channel_importance(
    stats: InputStats, weights: Sequence[Float[Tensor, "_ cols"]], statistic: Statistic
) -> Float[Tensor, " cols"]:
    """What each input channel of some linears that share it counts for, over the calibration tokens (section 3.2).

    Its magnitude; or its squared magnitude times the squared error of its weights as signs, the diagonal form of the
    Hessian that OWQ ranks by.
    """
    if statistic is Statistic.ABSMAX:
        return stats.absmax
    if statistic is Statistic.ABSMEAN:
        return stats.abs_sum / stats.tokens
    magnitudes = torch.cat([weight.float().abs() for weight in weights])
    errors = (magnitudes - magnitudes.mean(dim=1, keepdim=True)).square().sum(dim=0)
    return errors * stats.square_sum / stats.tokens
