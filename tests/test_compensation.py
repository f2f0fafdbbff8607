"""Compensated codes: against closed forms and brute force, on degenerate moments, and against plain rounding."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ptq161.allocation import MIXED_WIDTHS
from ptq161.binarize import CODE_WIDTHS, TERNARY, nearest_level, reconstruct, stored
from ptq161.blocks import BlockCall, BlockTask, second_moments, watch_inputs
from ptq161.compensation import compensated_weight, damped, drift_correction, inverse_factor
from ptq161.config import QuantConfig
from ptq161.errors import NonFiniteError
from ptq161.fit import measure
from ptq161.methods.mixed import mixed
from ptq161.mixed import best_scale, group_columns, mixed_weight

NAMES = tuple(width.name for width in MIXED_WIDTHS)
SUBSETS = [names for count in (1, 2, 3) for names in itertools.combinations(NAMES, count)]


def output_error(weight, quantized, moments):
    """D H D^T summed over the rows, in float64."""
    error = (weight - reconstruct(quantized)).double()
    return ((error @ moments.double()) * error).sum().item()


def correlated_moments(cols, tokens, generator):
    """Moments of inputs that a random matrix mixes, channels of unlike energy."""
    mixing = torch.randn(cols, cols, generator=generator) + 2 * torch.ones(cols, cols)
    inputs = torch.randn(tokens, cols, generator=generator) @ mixing * torch.rand(cols, generator=generator).exp()
    return inputs.T @ inputs


def even_widths(names, cols):
    """These widths with about as many channels each."""
    sizes = [len(part) for part in torch.arange(cols).tensor_split(len(names))]
    return tuple(zip(names, sizes, strict=True))


def ternary(weight):
    """Widths and columns with every channel ternary."""
    return [torch.arange(weight.shape[1])], (("ternary", weight.shape[1]),)


def test_two_channels_by_hand():
    """Channel 1 carries more energy and is rounded first; channel 0 then moves to W_0 + d_1 H_10 / H_00."""
    weight, moments = torch.tensor([[0.45, 0.7], [1.0, -1.0]]), torch.tensor([[1.0, 0.5], [0.5, 2.0]])
    quantized = compensated_weight(weight, *ternary(weight), moments).quantized()
    scale = quantized.groups[0].scale
    first = nearest_level(weight[:, 1:] / scale, TERNARY) * scale
    target = weight[:, :1] + (weight[:, 1:] - first) * moments[1, 0] / moments[0, 0]
    second = nearest_level(target / scale, TERNARY) * scale
    torch.testing.assert_close(reconstruct(quantized), torch.cat([second, first], dim=1), rtol=0, atol=0)


def test_the_last_channel_is_the_best_of_all_its_levels():
    """Of three channels the last may take any level; none gives less output error than the one chosen."""
    generator = torch.Generator().manual_seed(0)
    weight, moments = torch.randn(64, 3, generator=generator), correlated_moments(3, 20, generator)
    quantized = compensated_weight(weight, *ternary(weight), moments).quantized()
    (group,) = quantized.groups
    last = moments.diagonal().argmin()
    errors = []
    for level in (-1, 0, 1):
        codes = group.codes.clone()
        codes[:, last] = level
        error = weight - codes * group.scale
        errors.append(((error @ moments) * error).sum(dim=1))
    chosen = torch.stack(errors).gather(0, group.codes[None, :, last].long() + 1)[0]
    torch.testing.assert_close(chosen, torch.stack(errors).amin(dim=0), rtol=1e-4, atol=1e-4)


def test_remaining_channels_move_to_their_least_squares_optimum():
    """With the first channel's error given, the factor's first row moves the others where they repair most of it."""
    moments = correlated_moments(3, 20, torch.Generator().manual_seed(1)).double()
    factor = inverse_factor(moments)
    # With error 1 in channel 0, d H d^T is least at d = -H_rr^-1 H_r0 in the others: their weights move the other way.
    moved = -factor[0, 1:] / factor[0, 0]
    wanted = torch.linalg.solve(moments[1:, 1:], moments[1:, 0])
    torch.testing.assert_close(moved, wanted)
    left = moments[0, 0] - moments[0, 1:] @ wanted
    torch.testing.assert_close(factor[0, 0] ** -2, left)


@pytest.mark.parametrize("cols", [1, 2, 3, 200])
def test_inverse_factor(cols):
    moments = damped(correlated_moments(cols, 2 * cols, torch.Generator().manual_seed(cols)), 10**9).double()
    factor = inverse_factor(moments)
    assert factor.equal(factor.triu())
    torch.testing.assert_close(factor.T @ factor @ moments, torch.eye(cols, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("names", SUBSETS)
def test_channels_that_have_nothing_in_common_are_plainly_rounded(names):
    """H = identity: nothing to take back, the same codes and scales as the plain start, whatever the groups."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 300, generator=generator)
    widths = even_widths(names, 300)
    columns = group_columns(torch.rand(300, generator=generator), widths)
    plain = mixed_weight(weight, columns, widths, torch.ones(300))
    compensated = compensated_weight(weight, columns, widths, torch.eye(300)).quantized()
    for got, wanted in zip(compensated.groups, plain.groups, strict=True):
        assert got.width == wanted.width
        assert got.columns.equal(wanted.columns)
        assert got.codes.equal(wanted.codes)
        assert got.scale.equal(wanted.scale)


def gptq(weight, columns, widths, moments):
    """GPTQ as its section 3.1 has it, in float64: after each channel, all others move, and H^-1 loses that channel."""
    left, inverse = weight.double().clone(), torch.linalg.inv(moments.double())
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    for chosen, (name, _) in zip(columns, widths, strict=True):
        width, energy = CODE_WIDTHS[name], moments.diagonal()[chosen]
        scale = stored(best_scale(left[:, chosen].float(), width, energy)).double()
        for channel in chosen[energy.argsort(descending=True)]:
            codes[:, channel] = nearest_level(left[:, channel, None] / scale, width)[:, 0]
            error = left[:, channel] - codes[:, channel] * scale[:, 0]
            left -= error[:, None] * inverse[channel] / inverse[channel, channel]
            inverse = inverse - inverse[:, channel, None] * inverse[channel] / inverse[channel, channel]
            inverse[channel], inverse[:, channel] = 0, 0
    return codes


@pytest.mark.parametrize("names", SUBSETS)
def test_codes_are_those_of_a_straightforward_gptq(names):
    """Also across the boundary of the channels that are rounded at once, and where a group ends within them."""
    generator = torch.Generator().manual_seed(0)
    weight, moments = torch.randn(6, 290, generator=generator), correlated_moments(290, 2000, generator)
    widths = even_widths(names, 290)
    columns = group_columns(torch.rand(290, generator=generator), widths)
    moments = damped(moments, 2000)
    quantized = compensated_weight(weight, columns, widths, moments).quantized()
    wanted = gptq(weight, columns, widths, moments)
    for group in quantized.groups:
        assert group.codes.ne(wanted[:, group.columns]).float().mean() < 0.01  # ties that float32 breaks otherwise


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(16, 40),
    cols=st.integers(32, 160),
    names=st.sampled_from(SUBSETS),
)
def test_output_error_is_never_above_that_of_plain_rounding(seed, rows, cols, names):
    """Over a few rows and dozens of channels; one row of a handful of channels may be unlucky."""
    generator = torch.Generator().manual_seed(seed)
    weight, moments = torch.randn(rows, cols, generator=generator), correlated_moments(cols, 2 * cols, generator)
    widths = even_widths(names, cols)
    columns = group_columns(moments.diagonal() * weight.square().sum(dim=0), widths)
    moments = damped(moments, 2 * cols)
    plain = mixed_weight(weight, columns, widths, moments.diagonal())
    compensated = compensated_weight(weight, columns, widths, moments).quantized()
    assert output_error(weight, compensated, moments) < output_error(weight, plain, moments)
    for group in compensated.groups:
        assert group.scale.equal(group.scale.half().float())
        assert (group.scale > 0).all()
        levels = range(group.width.lowest, -group.width.lowest + 1, group.width.step)
        assert set(group.codes.unique().tolist()) <= set(levels)


def test_same_input_gives_the_same_bytes():
    generator = torch.Generator().manual_seed(0)
    weight, moments = torch.randn(8, 60, generator=generator), damped(correlated_moments(60, 99, generator), 99)
    widths = even_widths(NAMES, 60)
    columns = group_columns(moments.diagonal(), widths)
    before = weight.clone(), moments.clone()
    first, second = (compensated_weight(weight, columns, widths, moments) for _ in range(2))
    assert first.latent.equal(second.latent) and first.base.equal(second.base)
    assert weight.equal(before[0]) and moments.equal(before[1])


@pytest.mark.parametrize("names", SUBSETS)
def test_dead_channels_and_singular_moments(names):
    """Fewer tokens than channels, two channels equal, one without any input: finite, and the live ones unharmed."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(8, 40, generator=generator), torch.randn(10, 40, generator=generator)
    inputs[:, 7], inputs[:, 9] = inputs[:, 8], 0.0
    widths, columns = even_widths(names, 40), group_columns(torch.arange(40.0), even_widths(names, 40))
    moments = damped(inputs.T @ inputs, 10)
    assert moments[9, 9] > 0
    plain = mixed_weight(weight, columns, widths, moments.diagonal())
    compensated = compensated_weight(weight, columns, widths, moments).quantized()
    assert reconstruct(compensated).isfinite().all()
    assert output_error(weight, compensated, moments) < output_error(weight, plain, moments)


def test_float32_is_enough_for_channels_of_very_unlike_energy():
    """Massive activations: energies over eight orders of magnitude, one direction shared by all, few tokens."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 200, generator=generator) + 5 * torch.randn(300, 1, generator=generator)
    inputs *= torch.logspace(-4, 4, 200)[torch.randperm(200, generator=generator)]
    weight, moments = torch.randn(16, 200, generator=generator), damped(inputs.T @ inputs, 10**9)
    factor, exact = inverse_factor(moments), inverse_factor(moments.double())
    torch.testing.assert_close(factor.diagonal().double(), exact.diagonal(), rtol=1e-2, atol=0)
    widths = even_widths(NAMES, 200)
    columns = group_columns(moments.diagonal(), widths)
    compensated = compensated_weight(weight, columns, widths, moments).quantized()
    plain = mixed_weight(weight, columns, widths, moments.diagonal())
    assert output_error(weight, compensated, moments) < output_error(weight, plain, moments)


def test_no_input_at_all_is_plain_rounding():
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    moments = damped(torch.zeros(9, 9), 9)
    assert moments.equal(torch.eye(9))
    plain = mixed_weight(weight, *ternary(weight), torch.ones(9))
    assert reconstruct(compensated_weight(weight, *ternary(weight), moments).quantized()).equal(reconstruct(plain))
    assert drift_correction(torch.zeros(9, 9), torch.zeros(9, 9), 9).equal(torch.zeros(9, 9))


@pytest.mark.parametrize(("tokens", "share"), [(8, 0.25), (1, 2.0), (10**9, 0.01)])
def test_damping_follows_the_number_of_tokens(tokens, share):
    moments = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    wanted = torch.tensor([[2.0 * (1 + share) + 3e-6, 1.0], [1.0, 4.0 * (1 + share) + 3e-6]])
    torch.testing.assert_close(damped(moments, tokens), wanted)
    assert moments.diagonal().tolist() == [2.0, 4.0]


def test_drift_correction_is_nearest_to_both_targets():
    """Against least squares on the tokens themselves: both targets below each other, damping as further tokens."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    quantized = full + 0.5 * torch.randn(50, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    moments = (quantized.T @ quantized).float()
    ridge = (damped(moments, 50) - moments).diagonal().double().sqrt().diag()
    seen = torch.cat([quantized, quantized, 2**0.5 * ridge])
    wanted = torch.cat([full @ weight.T, quantized @ weight.T, 2**0.5 * ridge @ weight.T])
    best = torch.linalg.lstsq(seen, wanted).solution.T
    correction = drift_correction(moments, (full.T @ quantized).float(), 50).double()
    torch.testing.assert_close(weight + weight @ correction, best, rtol=1e-4, atol=1e-4)


COLS = 48
WIDTHS = (("1bit", 16), ("ternary", 26), ("4bit", 6))
INSTANT = QuantConfig(method="mixed", epochs=0)


class Gated(nn.Module):
    """Two linears on one input, a third on what becomes of them, defined before one of the others."""

    def __init__(self, generator):
        super().__init__()
        self.gate, self.down, self.up = (nn.Linear(COLS, COLS, bias=False) for _ in range(3))
        for linear in (self.gate, self.down, self.up):
            linear.weight.data = torch.randn(COLS, COLS, generator=generator) / COLS**0.5
        self.requires_grad_(False)

    def forward(self, hidden):
        return hidden + self.down(self.gate(hidden).sigmoid() * self.up(hidden))


def gated_task(seed=0):
    generator = torch.Generator().manual_seed(seed)
    block = Gated(generator)
    linears = {"gate": block.gate, "down": block.down, "up": block.up}
    mixing = torch.randn(COLS, COLS, generator=generator)
    full, noise = torch.randn(2, 6, 30, COLS, generator=generator) @ mixing / COLS**0.5 + 0.5
    quantized = full + 0.3 * noise
    with watch_inputs(linears) as stats:
        full_out = block(full)
    return BlockTask(
        index=3,
        block=block,
        linears=linears,
        columns_from={"up": "gate"},
        full_in=full,
        quantized_in=quantized,
        full_out=full_out,
        local_out=block(quantized),
        call=BlockCall((), {}),
        stats=stats,
        widths=dict.fromkeys(linears, WIDTHS),
    )


def ignore_step(step, steps, loss):
    """A method must not depend on who watches."""


def test_second_moments_pair_both_streams_through_the_given_weights():
    task = gated_task()
    x, y = task.full_in.flatten(0, 1), task.quantized_in.flatten(0, 1)
    moments, cross = second_moments(task, "up", {})
    torch.testing.assert_close(moments, y.T @ y, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(cross, x.T @ y, rtol=1e-4, atol=1e-3)
    gate, up, halved = task.linears["gate"].weight, task.linears["up"].weight, task.linears["gate"].weight / 2
    full, seen = (x @ gate.T).sigmoid() * (x @ up.T), (y @ halved.T).sigmoid() * (y @ up.T)
    moments, cross = second_moments(task, "down", {"gate.weight": halved})
    torch.testing.assert_close(moments, seen.T @ seen, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(cross, full.T @ seen, rtol=1e-4, atol=1e-3)
    assert not any(linear._forward_pre_hooks for linear in task.linears.values())


class Routed(nn.Module):
    """Only tokens whose first channel is positive reach the linear."""

    def __init__(self, expert):
        super().__init__()
        self.expert = expert

    def forward(self, hidden):
        chosen = hidden[..., 0] > 0
        if chosen.any():
            hidden = hidden.masked_scatter(chosen[..., None], self.expert(hidden[chosen]))
        return hidden


def test_tokens_of_an_expert_do_not_correspond():
    """The streams may send different tokens to it, or none at all: then only the quantized stream counts."""
    task = gated_task()
    block = Routed(task.linears["gate"])
    quantized = task.quantized_in.clone()
    quantized[0, :, 0] = -1.0
    task = replace(task, block=block, linears={"expert": block.expert}, quantized_in=quantized)
    moments, cross = second_moments(task, "expert", {})
    seen = quantized[quantized[..., 0] > 0]
    torch.testing.assert_close(moments, seen.T @ seen, rtol=1e-4, atol=1e-3)
    assert cross.equal(moments)


@pytest.mark.parametrize("stream", ["full_in", "quantized_in"])
def test_inputs_that_are_not_finite_are_named(stream):
    task = gated_task()
    getattr(task, stream)[0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="the input of gate in block 3 is not finite"):
        second_moments(task, "gate", {})


def test_without_learning_codes_are_compensated():
    """All linears in their order, those of one input on the same channels, closer to the original than rounding."""
    task = gated_task()
    result = mixed(task, INSTANT, ignore_step)
    assert list(result.weights) == list(result.latents) == list(task.linears)
    for gate, up in zip(result.weights["gate"].groups, result.weights["up"].groups, strict=True):
        assert gate.columns.equal(up.columns)
    assert result.loss_last == measure(task, result.weights, INSTANT)[0]
    for name, latent in result.latents.items():
        assert reconstruct(latent.quantized()).equal(reconstruct(result.weights[name]))
        assert latent.latent.requires_grad and latent.gain.requires_grad
    rounded = mixed(task, QuantConfig(method="mixed", epochs=1, lr_latent=0.0, lr_scale=0.0), ignore_step)
    assert result.loss_first == rounded.loss_first == rounded.loss_last
    assert result.loss_last < 0.9 * result.loss_first


def test_each_input_is_taken_as_the_linears_before_it_leave_it():
    """`down` compensates on what quantized `gate` and `up` feed it; rows of one linear do not touch the other's."""
    task = gated_task()
    weights = mixed(task, INSTANT, ignore_step).weights
    for name, before in (("gate", ()), ("up", ()), ("down", ("gate", "up"))):
        dense = {f"{other}.weight": reconstruct(weights[other]) for other in before}
        moments, cross = second_moments(task, name, dense)
        original = task.linears[name].weight
        target = original + original @ drift_correction(moments, cross, 6 * 30)
        columns = [group.columns for group in weights[name].groups]
        alone = compensated_weight(target, columns, WIDTHS, damped(moments, 6 * 30))
        assert reconstruct(alone.quantized()).equal(reconstruct(weights[name]))


def test_rounding_is_kept_where_compensation_is_no_better():
    """What was taken to be the two streams says nothing about the block: the objective decides."""
    task = gated_task()
    misled = replace(task, full_out=task.block(task.quantized_in), full_in=-50 * task.full_in)
    result = mixed(misled, INSTANT, ignore_step)
    rounded = mixed(misled, QuantConfig(method="mixed", epochs=1, lr_latent=0.0, lr_scale=0.0), ignore_step)
    assert result.loss_last == result.loss_first == rounded.loss_first
    for name, weight in result.weights.items():
        assert reconstruct(weight).equal(reconstruct(rounded.weights[name]))
