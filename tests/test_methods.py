"""Methods on one block: the paper's own on a matrix worked out by hand, and the masks it chooses."""

from dataclasses import replace

import pytest
import torch
from test_binarize import random_weight
from torch import nn

from ptq161.binarize import reconstruct
from ptq161.blocks import BlockCall, BlockTask, watch_inputs
from ptq161.config import Compute, Magnitude, QuantConfig, SalientRange, Statistic
from ptq161.methods import METHODS
from ptq161.methods.ptq161 import block_masks, channel_importance, ptq161


class TwoLinears(nn.Module):
    """A block of two linears that see the same input."""

    def __init__(self, weight):
        super().__init__()
        rows, cols = weight.shape
        self.one, self.two = nn.Linear(cols, rows, bias=False), nn.Linear(cols, rows, bias=False)
        self.one.weight.data, self.two.weight.data = weight.clone(), -2 * weight
        self.requires_grad_(False)

    def forward(self, hidden):
        return hidden + self.one(hidden) - self.two(hidden)


def task_of(weight, hidden, ratio):
    block = TwoLinears(weight)
    linears = {"one": block.one, "two": block.two}
    with watch_inputs(linears) as stats:
        wanted = block(hidden)
    return BlockTask(
        index=0,
        block=block,
        linears=linears,
        columns_from={"two": "one"},
        quantized_in=hidden,
        full_out=wanted,
        local_out=wanted,
        call=BlockCall((), {}),
        stats=stats,
        salient_ratio=ratio,
    )


WEIGHT = torch.tensor([[4.0, 1.25, 1.0, 1.0], [-1.0, -2.5, -2.0, 3.0], [0.0, 3.75, 0.0, 0.0], [-2.0, 0.0, -2.0, -2.0]])
# Channel 1 has the largest value, and so does channel 3 on average.
HIDDEN = torch.tensor([[[1.0, 9.0, 0.5, -8.0], [-1.0, 0.0, 0.5, 8.0]]])
CONFIG = QuantConfig(
    bits=None,
    salient_ratio=0.25,
    epochs=0,
    statistic=Statistic.ABSMAX,
    salient_range=SalientRange.SALIENT,
    row_mean=True,
    magnitude=Magnitude.MSE,
    angular=True,
    compute=Compute.FLOAT32,
)


def ignore_step(step, steps, loss):
    """A method must not depend on who watches."""


def test_papers_method_by_hand():
    """Channel 1 salient (largest |x|); the others centred, signed, scaled by mean |w|."""
    result = ptq161(task_of(WEIGHT, HIDDEN, 0.25), CONFIG, ignore_step)
    expected = torch.tensor(
        [
            [2 + 2.0, 1.25, 2 - 2.0, 2 - 2.0],
            [0 - 2.0, -2.5, 0 - 2.0, 0 + 2.0],
            [0.0, 3.75, 0.0, 0.0],
            [-2 + 2.0, 0.0, -2 + 2.0, -2 + 2.0],
        ]
    )
    torch.testing.assert_close(reconstruct(result.weights["one"]), expected, rtol=1e-3, atol=0)
    binary, salient = result.weights["one"].groups
    assert (binary.columns.tolist(), salient.columns.tolist()) == ([0, 2, 3], [1])


def test_first_loss_is_the_initial_factors():
    task = task_of(WEIGHT, HIDDEN, 0.25)
    result = ptq161(task, CONFIG, ignore_step)
    dense = {name: reconstruct(weight) for name, weight in result.weights.items()}
    out = HIDDEN + HIDDEN @ dense["one"].T - HIDDEN @ dense["two"].T
    error = (out - task.full_out).square().mean()
    cosine = nn.functional.cosine_similarity(out, task.full_out, dim=-1).mean()
    assert result.loss_first == pytest.approx(2 * (error - cosine.log()).item(), rel=1e-3)


def test_learning_starts_there_and_ends_lower_on_what_is_stored():
    generator = torch.Generator().manual_seed(0)
    task = task_of(random_weight(16, 16), torch.randn(4, 10, 16, generator=generator), 0.25)
    learned = replace(CONFIG, epochs=5, lr_scale=1e-2, lr_angular=1e-2)
    fixed, result = ptq161(task, CONFIG, ignore_step), ptq161(task, learned, ignore_step)
    assert result.loss_first == fixed.loss_first
    for weight in result.weights.values():
        for group in weight.groups:
            assert group.row is None
            assert group.scale.equal(group.scale.half().float())
    dense = {name: reconstruct(weight) for name, weight in result.weights.items()}
    before = {name: reconstruct(weight) for name, weight in fixed.weights.items()}

    def error(weights):
        out = task.quantized_in @ (weights["one"] - weights["two"]).T
        return (out - (task.full_out - task.quantized_in)).square().mean()

    assert error(dense) < error(before)


def test_randomness_depends_on_seed_and_block_alone():
    generator = torch.Generator().manual_seed(0)
    task = task_of(random_weight(8, 8), torch.randn(4, 10, 8, generator=generator), 0.25)
    config = replace(CONFIG, epochs=3, lr_scale=1e-2)

    def scale(task, config):
        return ptq161(task, config, ignore_step).weights["one"].groups[0].scale

    first = scale(task, config)
    torch.manual_seed(123)
    assert scale(task, config).equal(first)
    assert not scale(task, replace(config, seed=1)).equal(first)
    assert not scale(replace(task, index=1), config).equal(first)


def test_statistics_rank_channels_differently():
    stats = task_of(WEIGHT, HIDDEN, 0.25).stats["one"]
    assert channel_importance(stats, Statistic.ABSMAX).tolist() == [1.0, 9.0, 0.5, 8.0]
    assert channel_importance(stats, Statistic.ABSMEAN).tolist() == [1.0, 4.5, 0.5, 8.0]


@pytest.mark.parametrize(("statistic", "channel"), [(Statistic.ABSMAX, 1), (Statistic.ABSMEAN, 3)])
def test_linears_with_one_input_share_their_mask(statistic, channel):
    masks = block_masks(task_of(WEIGHT, HIDDEN, 0.25), statistic)
    assert masks["one"].nonzero().squeeze(1).tolist() == [channel]
    assert masks["two"].equal(masks["one"])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_every_method_returns_every_linear_in_full(name, ratio):
    task = task_of(WEIGHT, HIDDEN, ratio)
    config = replace(CONFIG, method=name, salient_ratio=ratio, epochs=1)
    weights = METHODS[name](task, config, ignore_step).weights
    assert list(weights) == ["one", "two"]
    for weight in weights.values():
        assert reconstruct(weight).shape == WEIGHT.shape
        assert reconstruct(weight).isfinite().all()
