"""Methods on one block: the paper's own on a matrix worked out by hand, and the masks it chooses."""

import sys
from dataclasses import replace

import pytest
import torch
from test_binarize import random_weight
from test_fit import paper_widths
from torch import nn

from ptq161.binarize import reconstruct
from ptq161.blocks import BlockCall, BlockTask, watch_inputs
from ptq161.config import Compute, Magnitude, QuantConfig, SalientRange, Statistic
from ptq161.fit import fit_latents, measure
from ptq161.methods import METHODS
from ptq161.methods.mixed import ATTEMPTS, BACK_OFF, mixed
from ptq161.methods.ptq161 import block_masks, channel_importance, ptq161
from ptq161.mixed import group_columns, mixed_weight


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


def task_of(weight, hidden, ratio=None, widths=None):
    block = TwoLinears(weight)
    linears = {"one": block.one, "two": block.two}
    with watch_inputs(linears) as stats:
        wanted = block(hidden)
    return BlockTask(
        index=0,
        block=block,
        linears=linears,
        columns_from={"two": "one"},
        full_in=hidden,
        quantized_in=hidden,
        full_out=wanted,
        local_out=wanted,
        call=BlockCall((), {}),
        stats=stats,
        widths=dict.fromkeys(linears, widths or paper_widths(weight.shape[1], ratio)),
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
    assert channel_importance(stats, [], Statistic.ABSMAX).tolist() == [1.0, 9.0, 0.5, 8.0]
    assert channel_importance(stats, [], Statistic.ABSMEAN).tolist() == [1.0, 4.5, 0.5, 8.0]


def test_the_hessian_ranks_by_the_error_of_signs():
    stats = task_of(WEIGHT, HIDDEN, 0.25).stats["one"]
    weights = [torch.tensor([[1.0, -1, 1, 5]]), torch.tensor([[2.0, 2, -4, 8], [1, 1, 1, 1]])]
    errors = torch.tensor([1.0 + 4 + 0, 1.0 + 4 + 0, 1.0 + 0 + 0, 9.0 + 16 + 0])  # rows have mean magnitudes 2, 4 and 1
    squares = torch.tensor([1.0, 40.5, 0.25, 64.0])
    assert channel_importance(stats, weights, Statistic.HESSIAN).equal(squares * errors)


@pytest.mark.parametrize(
    ("statistic", "channel"), [(Statistic.ABSMAX, 1), (Statistic.ABSMEAN, 3), (Statistic.HESSIAN, 1)]
)
def test_linears_with_one_input_share_their_mask(statistic, channel):
    masks = block_masks(task_of(WEIGHT, HIDDEN, 0.25), statistic)
    assert masks["one"].nonzero().squeeze(1).tolist() == [channel]
    assert masks["two"].equal(masks["one"])


# Mixed widths with learned codes

MIXED = replace(CONFIG, method="mixed", magnitude=Magnitude.RELATIVE, angular=False, epochs=4, lr_scale=5e-3)
WIDTHS = (("1bit", 5), ("ternary", 9), ("4bit", 2))


def mixed_task(seed=0, widths=WIDTHS):
    """Two random linears that see one input, whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, 10, 16, generator=generator) * torch.randn(16, generator=generator).exp()
    return task_of(torch.randn(16, 16, generator=generator) / 4, hidden, widths=widths)


def mixed_start(task):
    """Codes and scales of the start point, put together anew: importance summed over both linears."""
    squares = task.stats["one"].square_sum
    importance = sum(squares * linear.weight.square().sum(dim=0) for linear in task.linears.values())
    columns = group_columns(importance, WIDTHS)
    mean = squares / task.stats["one"].tokens
    return {name: mixed_weight(linear.weight, columns, WIDTHS, mean) for name, linear in task.linears.items()}


def same_weight(one, other):
    return all(
        a.codes.equal(b.codes) and a.scale.equal(b.scale) and a.columns.equal(b.columns)
        for a, b in zip(one.groups, other.groups, strict=True)
    )


def test_mixed_start_by_hand():
    """Importance 4^2 * (1 + 4) and so on: channel 1 at 4 bits, 0 and 3 ternary, 2 at 1 bit."""
    weight = torch.tensor([[1.0, 2.0, 0.5, -1.0], [1.0, -2.0, -0.5, 1.0]])
    hidden = torch.tensor([[[1.0, 4.0, 1.0, -2.0], [-1.0, 4.0, 1.0, 2.0]]])
    square = nn.Linear(4, 4, bias=False)
    square.weight.data = torch.cat([weight, weight])
    task = task_of(square.weight.detach(), hidden, widths=(("1bit", 1), ("ternary", 2), ("4bit", 1)))
    result = METHODS["mixed"](task, replace(MIXED, epochs=0), ignore_step)
    one, ternary, four = result.weights["one"].groups
    assert (one.columns.tolist(), ternary.columns.tolist(), four.columns.tolist()) == ([2], [0, 3], [1])
    assert one.codes[:2].tolist() == [[1], [-1]] and one.scale[:2].tolist() == [[0.5], [0.5]]
    assert ternary.codes[:2].tolist() == [[1, -1], [1, 1]] and ternary.scale[:2].tolist() == [[1.0], [1.0]]
    torch.testing.assert_close(reconstruct(result.weights["one"])[:2], weight, rtol=1e-3, atol=0)
    torch.testing.assert_close(reconstruct(result.weights["two"])[:2], -2 * weight, rtol=1e-3, atol=0)


def test_mixed_that_learns_nothing_is_its_start():
    task = mixed_task()
    result = mixed(task, replace(MIXED, epochs=1, lr_latent=0.0, lr_scale=0.0), ignore_step)
    start = mixed_start(task)
    assert all(same_weight(result.weights[name], start[name]) for name in start)
    loss, outputs = measure(task, start, MIXED)
    assert result.loss_first == result.loss_last == loss
    assert result.outputs.equal(outputs)


def test_learned_result_is_what_its_latents_stand_for_and_better():
    task = mixed_task()
    result = mixed(task, replace(MIXED, epochs=20), ignore_step)
    assert result.loss_first == measure(task, mixed_start(task), MIXED)[0]
    loss, outputs = measure(task, result.weights, MIXED)
    assert result.loss_last == loss < 0.9 * result.loss_first
    assert result.outputs.equal(outputs)
    for name, weight in result.weights.items():
        assert same_weight(weight, result.latents[name].quantized())
        assert [(group.width.name, len(group.columns)) for group in weight.groups] == list(WIDTHS)


def test_linears_with_one_input_share_their_columns():
    result = mixed(mixed_task(), MIXED, ignore_step)
    for one, two in zip(*(weight.groups for weight in result.weights.values()), strict=True):
        assert one.columns.equal(two.columns)


def test_the_important_channels_get_the_wide_codes():
    task = mixed_task()
    squares, weights = task.stats["one"].square_sum, [linear.weight for linear in task.linears.values()]
    importance = sum(squares * weight.square().sum(dim=0) for weight in weights)
    one, ternary, four = mixed(task, replace(MIXED, epochs=0), ignore_step).weights["two"].groups
    assert importance[four.columns].min() > importance[ternary.columns].max()
    assert importance[ternary.columns].min() > importance[one.columns].max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rates", [(2e-2, 5e-3), (5.0, 5e-3), (1e4, 1e4), (1e30, 1e30), (0.0, 0.0)])
def test_mixed_is_never_worse_than_its_start(seed, rates):
    task = mixed_task(seed)
    result = mixed(task, replace(MIXED, lr_latent=rates[0], lr_scale=rates[1]), ignore_step)
    assert result.loss_last <= result.loss_first == measure(task, mixed_start(task), MIXED)[0]
    loss, outputs = measure(task, result.weights, MIXED)
    assert result.loss_last == loss and result.outputs.equal(outputs)
    assert all(same_weight(weight, result.latents[name].quantized()) for name, weight in result.weights.items())


def test_rates_that_are_too_high_are_lowered_until_they_help(monkeypatch):
    """An attempt that ends above the start is repeated at a quarter of the rates; then its result counts."""
    task, tried = mixed_task(), []
    whole = fit_latents

    def watched(task, latents, config, generator, on_step):
        tried.append((config.lr_latent, config.lr_scale))
        whole(task, latents, config, generator, on_step)

    monkeypatch.setattr(sys.modules["ptq161.methods.mixed"], "fit_latents", watched)
    high = replace(MIXED, lr_latent=1.6, lr_scale=5e-3, epochs=20)
    result = mixed(task, high, ignore_step)
    assert tried[:2] == [(1.6, 5e-3), (1.6 / BACK_OFF, 5e-3 / BACK_OFF)] and len(tried) <= ATTEMPTS
    assert result.loss_last < result.loss_first
    lowered = replace(high, lr_latent=tried[-1][0], lr_scale=tried[-1][1])
    direct = mixed(task, lowered, ignore_step)
    assert all(same_weight(result.weights[name], direct.weights[name]) for name in direct.weights)


def test_hopeless_rates_leave_the_start_after_some_attempts():
    task, steps = mixed_task(), []
    config = replace(MIXED, lr_latent=1e30, lr_scale=1e30)
    result = mixed(task, config, lambda step, of, loss: steps.append(step))
    start = mixed_start(task)
    assert all(same_weight(result.weights[name], start[name]) for name in start)
    assert steps.count(1) == ATTEMPTS
    for name, linear in task.linears.items():  # what is learned further is at its start, too
        columns = torch.cat([group.columns for group in start[name].groups])
        assert result.latents[name].latent.equal(linear.weight[:, columns])


def test_mixed_depends_on_seed_and_block_alone():
    task = mixed_task()

    def scale(task, config):
        return mixed(task, config, ignore_step).weights["one"].groups[1].scale

    first = scale(task, MIXED)
    torch.manual_seed(123)
    assert scale(task, MIXED).equal(first)
    assert not scale(task, replace(MIXED, seed=1)).equal(first)
    assert not scale(replace(task, index=1), MIXED).equal(first)


# All of them


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_every_method_returns_every_linear_in_full(name, ratio):
    task = task_of(WEIGHT, HIDDEN, ratio)
    config = replace(CONFIG, method=name, salient_ratio=ratio, epochs=1)
    result = METHODS[name](task, config, ignore_step)
    assert list(result.weights) == ["one", "two"]
    for weight in result.weights.values():
        assert reconstruct(weight).shape == WEIGHT.shape
        assert reconstruct(weight).isfinite().all()
    loss, outputs = measure(task, result.weights, config)
    assert result.loss_last == loss and result.outputs.equal(outputs)
    assert (result.latents is not None) == (name == "mixed")
