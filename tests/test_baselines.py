"""Baselines: each on a case worked out by hand or in closed form, and all of them on what none may get wrong."""

import math
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, build
from torch import nn

from ptq161.baselines import apply_baseline
from ptq161.blocks import BlockCall
from ptq161.compensation import inverse_factor
from ptq161.errors import InputError, NonFiniteError
from ptq161.methods import BASELINES, METHODS
from ptq161.methods.awq import Awq, clipped_rounding, module_around
from ptq161.methods.awq import channel_scale as awq_scale
from ptq161.methods.baseline import Baseline, BaselineTask
from ptq161.methods.billm import (
    BiLlm,
    billm_bits,
    binarize_groups,
    binarized,
    quantiles,
    search_groups,
    split_gains,
)
from ptq161.methods.gptq import Gptq
from ptq161.methods.hessian import BLOCK, compensate, damped_factor, input_moments
from ptq161.methods.omniquant import OmniQuant, straight_through
from ptq161.methods.owq import Owq, search_grid, weak_counts
from ptq161.methods.pb_llm import PbLlm, binary_row, least_salient
from ptq161.methods.quip import Quip, ldlq, random_orthogonal, two_factors
from ptq161.methods.rtn import RoundToNearest, nearest
from ptq161.methods.smoothquant import SmoothQuant, inspect_inputs, round_tokens, smoothing
from ptq161.methods.uniform import UniformGrid, minmax_grid, spans, uniform_bits

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 96, (3, 16), generator=torch.Generator().manual_seed(0))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_moments(cols, tokens=512, seed=1):
    """H of inputs whose channels go together and differ in size."""
    inputs = normal(tokens, cols, seed=seed) @ (torch.eye(cols) + 0.3 * normal(cols, cols, seed=seed + 1))
    inputs *= normal(cols, seed=seed + 2).exp()
    return inputs.T @ inputs


def output_error(weight, quantized, moments):
    return ((weight - quantized) @ moments @ (weight - quantized).T).trace().item()


class Pair(nn.Module):
    """A block of two linears on one input and a third on their product."""

    def __init__(self, cols, rows):
        super().__init__()
        self.one, self.two = nn.Linear(cols, rows, bias=False), nn.Linear(cols, rows, bias=False)
        self.last = nn.Linear(rows, cols, bias=False)
        for seed, linear in enumerate((self.one, self.two, self.last)):
            linear.weight.data = normal(*linear.weight.shape, seed=seed) / math.sqrt(linear.in_features)
        self.requires_grad_(False)

    def forward(self, hidden):
        return hidden + self.last(self.one(hidden) * self.two(hidden))


def pair_task(cols=160, rows=24, dead=(), samples=4):
    block = Pair(cols, rows)
    hidden = normal(samples, 40, cols, seed=7) * normal(cols, seed=8).exp()
    hidden[..., list(dead)] = 0.0
    linears = {"one": block.one, "two": block.two, "last": block.last}
    return BaselineTask(0, block, linears, {"two": "one"}, hidden, block(hidden), BlockCall((), {}))


def run(baseline, task, seed=0):
    return baseline(task, torch.Generator().manual_seed(seed))


# Uniform grids and RTN


def test_rtn_by_hand():
    """Rows from -1 to 2 and from 0 to 3: a step of 1, zero at code 1 and at code 0; a row of zeros stays."""
    weight = torch.tensor([[-1.0, 2.0, 0.4, 0.6, -0.2], [3.0, 0.2, 1.4, 1.6, 2.2], [0.0, 0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[-1.0, 2.0, 0.0, 1.0, 0.0], [3.0, 0.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert nearest(weight, 2, None).equal(expected)


def test_rtn_in_groups_is_rtn_of_each_group():
    weight = normal(6, 20)
    parts = [nearest(weight[:, first : first + 8], 3, None) for first in (0, 8, 16)]
    assert nearest(weight, 3, 8).equal(torch.cat(parts, dim=1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_holds_zero_and_few_values_and_is_near(bits):
    weight = normal(16, 200) + 0.5 * normal(16, 1)
    grid = minmax_grid(weight, bits)
    rounded = grid.rounded(weight)
    assert all(len(row.unique()) <= 2**bits for row in rounded)
    assert grid.rounded(torch.zeros(16, 1)).eq(0).all()
    assert grid.scale.equal(grid.scale.half().float())
    assert ((rounded - weight).abs() <= 0.51 * grid.scale + 2e-3 * weight.abs()).all()


def test_uniform_bits_by_hand():
    """576 channels are four groups of 128 and one of 64."""
    assert [len(range(576)[span]) for span in spans(576, 128)] == [128, 128, 128, 128, 64]
    assert uniform_bits((10, 576), 2, 128) == {"codes": 11520, "scales": 10 * 5 * 16, "zeros": 10 * 5 * 2}
    assert uniform_bits((10, 576), 2, None) == {"codes": 11520, "scales": 160, "zeros": 20}


# Error compensation and GPTQ


def test_moments_are_those_of_each_input():
    task = pair_task()
    hidden = task.inputs.flatten(0, 1)
    inner = task.block.one(hidden) * task.block.two(hidden)
    moments = input_moments(task)
    assert list(moments) == ["one", "last"]
    torch.testing.assert_close(moments["one"], hidden.T @ hidden, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(moments["last"], inner.T @ inner, rtol=1e-4, atol=1e-2)


def test_factor_is_that_of_the_damped_inverse():
    moments = correlated_moments(12)
    moments[3], moments[:, 3] = 0.0, 0.0
    factor, dead = damped_factor(moments, 0.01)
    assert dead.nonzero().flatten().tolist() == [3]
    moments[3, 3] = 1.0
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(12)
    assert factor.tril(-1).eq(0).all()
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(12), rtol=0, atol=1e-4)


def by_inverse_updates(weight, moments, round_channel):
    """GPTQ without its factor: after each channel the others move by H^-1, from which the channel is then removed."""
    left, inverse = weight.double().clone(), torch.linalg.inv(moments.double())
    for channel in range(weight.shape[1]):
        rounded = round_channel(channel, left[:, channel, None].float()).double()[:, 0]
        error = (left[:, channel] - rounded) / inverse[channel, channel]
        left -= error[:, None] * inverse[channel]
        left[:, channel] = rounded
        inverse = inverse - torch.outer(inverse[:, channel], inverse[channel]) / inverse[channel, channel]
    return left.float()


def test_compensation_equals_inverse_updates():
    """Blocks of 128 and the factor change how it is computed, not what: 300 channels, three blocks."""
    weight, moments = normal(5, 300), correlated_moments(300, tokens=2000)
    grid = minmax_grid(weight, 3)

    def round_channel(position, values):
        return grid.rounded(values)

    fast = compensate(weight, inverse_factor(moments), lambda first, part: round_channel)
    slow = by_inverse_updates(weight, moments, round_channel)
    same = (fast - slow).abs() < 1e-3
    assert same.float().mean() > 0.99  # a value halfway between two codes may go either way, and others follow it
    assert output_error(weight, fast, moments) == pytest.approx(output_error(weight, slow, moments), rel=0.02)


def test_compensation_by_hand():
    """H = [[2, 1], [1, 2]]: an error e in channel 0 is made up for by e/2 in channel 1."""
    weight, moments = torch.tensor([[0.4, 1.2], [0.6, -1.4]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    seen = []

    def round_channel(position, values):
        seen.append(values.flatten().tolist())
        return values.round()

    rounded = compensate(weight, inverse_factor(moments), lambda first, part: round_channel)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([[0.4, 0.6], [1.2 + 0.2, -1.4 - 0.2]]))
    assert rounded.tolist() == [[0.0, 1.0], [1.0, -2.0]]


def test_uncounted_channels_take_the_errors_back():
    """Those not rounded end where they minimize the output error: its gradient there is zero."""
    weight, moments = normal(4, 40), correlated_moments(40)
    done = compensate(weight, inverse_factor(moments), lambda first, part: lambda position, x: x.round(), count=30)
    assert done[:, :30].equal(done[:, :30].round())
    gradient = ((done - weight) @ moments)[:, 30:]
    assert gradient.abs().max() < 1e-3 * ((weight.round() - weight) @ moments).abs().max()


@pytest.mark.parametrize("group", [None, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_on_uncorrelated_inputs_is_rtn(bits, group):
    weight = normal(8, 200)
    result = Gptq(bits, group).quantize(weight, torch.eye(200))
    torch.testing.assert_close(result.weight, nearest(weight, bits, group))


@pytest.mark.parametrize("group", [None, 128])
def test_gptq_beats_rtn_on_the_layers_output(group):
    weight, moments = normal(32, 200), correlated_moments(200)
    result = Gptq(3, group).quantize(weight, moments)
    assert output_error(weight, result.weight, moments) < 0.75 * output_error(
        weight, nearest(weight, 3, group), moments
    )
    assert all(len(row.unique()) <= 2**3 for row in result.weight[:, :BLOCK])


@pytest.mark.parametrize("group", [None, 128])
def test_gptq_by_act_order_is_gptq_on_sorted_channels(group):
    weight, moments = normal(16, 200), correlated_moments(200)
    order = moments.diagonal().argsort(descending=True)
    result = Gptq(3, group, act_order=True).quantize(weight, moments)
    plain = Gptq(3, group).quantize(weight[:, order], moments[order][:, order])
    assert result.weight[:, order].equal(plain.weight)
    assert not result.weight.equal(Gptq(3, group).quantize(weight, moments).weight)
    assert sum(result.bits.values()) - sum(plain.bits.values()) == (0 if group is None else 200 * 16)


def test_gptq_takes_groups_that_fit_its_blocks_only():
    with pytest.raises(InputError, match=r"group=96.*divisor of 128"):
        Gptq(2, 96)


# PB-LLM


def test_pb_llm_by_hand():
    """On uncorrelated inputs: the weight of 8 is kept at 8 bits, the others centred (it counts as 0) and signed."""
    weight = torch.tensor([[8.0, 1.0, -3.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0, 2.0]])
    low = least_salient(weight.square(), 0.8)
    assert (~low).nonzero().tolist() == [[0, 0]]
    mean, scale = binary_row(weight, low)
    torch.testing.assert_close(mean, torch.tensor([[0.0], [0.8]]), rtol=1e-3, atol=0)
    torch.testing.assert_close(scale, torch.tensor([[6 / 5], [(0.2 * 3 + 1.8 + 1.2) / 5]]), rtol=1e-3, atol=0)
    result = PbLlm(low_fraction=0.8).quantize(weight, torch.eye(5))
    expected = torch.tensor([[8.0, 1.2, -1.2, 1.2, 1.2], [1.52, 1.52, 1.52, 0.08, 1.52]])
    torch.testing.assert_close(result.weight, expected, rtol=1e-2, atol=0)
    assert result.bits == {"codes": 9 + 8, "bitmap": 10, "scales": 64, "means": 32, "zeros": 16}


def test_pb_llm_is_2_7_bits_where_it_claims_1_7():
    baseline = PbLlm()
    assert baseline.claimed_bits == pytest.approx(1.7)
    bits = baseline.quantize(normal(64, 1024), torch.eye(1024)).bits
    vectors = (3 * 16 + 8) / 1024
    assert sum(bits.values()) / (64 * 1024) == pytest.approx(2.7 + vectors, abs=1e-3)


def test_pb_llm_saliency_follows_the_inputs():
    """All 15 of 160 weights that are kept lie in the channel with much larger inputs, though they are no larger."""
    moments = torch.eye(10)
    moments[4, 4] = 1e6
    weight = normal(16, 10)
    result = PbLlm(damping=1e-9).quantize(weight, moments)
    errors = (result.weight - weight).abs()
    assert errors[:, 4].sort().values[:15].max() < 0.02
    assert errors[:, :4].mean() > 0.2


# BiLLM


def test_binarized_by_hand():
    """(1, 3, 5, 7): centre 4, scale 2; what is left, (-1, 1, -1, 1), again: exact. Outside the mask zero."""
    values, mask = torch.tensor([[1.0, 3.0, 5.0, 7.0, 100.0]]), torch.tensor([[True, True, True, True, False]])
    assert binarized(values, mask, 1).tolist() == [[2.0, 2.0, 6.0, 6.0, 0.0]]
    assert binarized(values, mask, 2).tolist() == [[1.0, 3.0, 5.0, 7.0, 0.0]]
    assert binarized(values, torch.zeros_like(mask), 2).eq(0).all()


def test_billm_groups_by_hand():
    """One column is far above the rest, and the rest has two sizes: found, and the block is exact."""
    small, large = 0.01, 1.0
    weight = torch.tensor([[9.0, small, -small, large, -large, small], [5.0, -small, small, -large, large, large]])
    weight[1, 5] = -small
    columns, upper = search_groups(weight.square())
    assert columns.tolist() == [True, False, False, False, False, False]
    assert upper.equal((weight.abs() == large) & ~columns)
    torch.testing.assert_close(binarize_groups(weight, columns, upper), weight, rtol=2e-3, atol=2e-2)


def test_billm_gain_of_a_split_is_what_binarizing_the_halves_takes_off():
    values = normal(6, 40).square()
    thresholds = values.flatten().quantile(torch.tensor([0.0, 0.3, 0.7, 0.99]))
    gains = split_gains(values, thresholds)
    for threshold, gain in zip(thresholds, gains, strict=True):
        upper = values >= threshold
        rounded = binarized(values, upper, 1) + binarized(values, ~upper, 1)
        left = (values - rounded).double().square().sum()
        assert abs(values.double().square().sum() - gain - left) < 1e-3 * left


def test_billm_groups_do_not_depend_on_the_size_of_the_saliencies():
    """Those of real models go beyond float16's range."""
    saliency = (normal(16, 128) * normal(128, seed=1).exp()).square()
    columns, upper = search_groups(saliency)
    for factor in (2.0**-30, 2.0**30):
        scaled_columns, scaled_upper = search_groups(saliency * factor)
        assert scaled_columns.equal(columns)
        assert scaled_upper.equal(upper)


def test_quantiles_are_torchs():
    values, shares = normal(7, 9), torch.linspace(0.1, 0.9, 81)
    torch.testing.assert_close(quantiles(values, shares), values.flatten().quantile(shares))


def test_billm_is_2_88_bits_on_a_4096_square_layer():
    """Whatever the number of salient columns: their second sign takes the place of the others' bitmap."""
    for count in (1, 20, 49):
        columns = torch.zeros(128, dtype=torch.bool)
        columns[:count] = True
        bits = billm_bits(4096, [columns] * 32)
        assert round(sum(bits.values()) / 4096**2, 2) == 2.88
        assert sum(bits.values()) == 4096**2 * 2 + 4096 * 32 * 7 * 16 + 4096


def test_billm_values_are_few_enough_for_its_bits():
    """A row of a block: four values in salient columns, two in each half of the others."""
    weight = normal(16, 256)
    quantized = BiLlm().quantize(weight, correlated_moments(256)).weight
    for part in quantized.split(128, dim=1):
        assert all(len(row.unique()) <= 4 + 2 + 2 for row in part)


def test_billm_later_blocks_make_up_for_earlier_ones():
    """Where a few directions carry most of the input, as in real models."""
    weight = normal(16, 256)
    inputs = normal(1000, 8, seed=1) @ normal(8, 256, seed=2) + 0.5 * normal(1000, 256, seed=3)
    moments = inputs.T @ inputs
    compensated = BiLlm().quantize(weight, moments).weight
    one, two = slice(0, 128), slice(128, 256)
    alone = torch.cat([BiLlm().quantize(weight[:, part], moments[part, part]).weight for part in (one, two)], dim=1)
    assert output_error(weight, compensated, moments) < 0.7 * output_error(weight, alone, moments)
    assert not compensated[:, two].equal(alone[:, two])


# AWQ


def test_awq_module_around():
    assert module_around(["mlp.down_proj"]) == "mlp.down_proj"
    assert module_around(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]) == "self_attn"
    assert module_around(["self_attention.query_key_value", "mlp.dense_h_to_4h"]) == ""


def test_awq_scale_by_hand():
    """Magnitudes 1 and 16 at ratio 1/2: 1 and 4, over the root of their product."""
    torch.testing.assert_close(awq_scale(torch.tensor([1.0, 16.0]), 0.5), torch.tensor([0.5, 2.0]))
    assert awq_scale(torch.tensor([0.0, 16.0]), 0.0).equal(torch.ones(2))


def test_awq_clips_an_outlier_that_meets_no_input():
    """The largest weight's channel is zero: clipping it makes the others' grid finer."""
    part = torch.cat([normal(4, 63), torch.full((4, 1), 9.0)], dim=1)
    inputs = normal(512, 64, seed=1)
    inputs[:, 63] = 0.0
    clipped = clipped_rounding(part, inputs, 2)
    assert (clipped[:, 63] < 6).all()

    def error(rounded):
        return ((rounded - part) @ inputs.T).square().mean()

    assert error(clipped) < error(nearest(part, 2, None))


def test_awq_protects_loud_channels():
    task = pair_task(cols=64)
    awq, rtn = run(Awq(bits=3), task), run(RoundToNearest(3, 128), task)
    moments = input_moments(task)
    for name, owner in (("one", "one"), ("two", "one"), ("last", "last")):
        weight = task.linears[name].weight
        errors = [output_error(weight, result[name].weight, moments[owner]) for result in (awq, rtn)]
        assert errors[0] < errors[1]


# OmniQuant


def test_omniquant_gradient_by_hand():
    """Codes round(x / s) within the grid pass the gradient as if not rounded; those beyond it follow the scale."""
    scale = torch.tensor([[1.0]], requires_grad=True)
    grid = UniformGrid(2, scale, torch.tensor([[0.0]]))
    values = torch.tensor([[1.4, 9.0]])
    rounded = straight_through(values, grid)
    assert rounded.tolist() == [[1.0, 3.0]]
    rounded.sum().backward()
    torch.testing.assert_close(scale.grad, torch.tensor([[(1.0 - 1.4) + 3.0]]))


def test_omniquant_learns_to_clip_outliers():
    """From nearly no clipping (sigmoid(4) = 0.98) to a block output nearer the original's."""
    task = pair_task(cols=32)
    for linear in task.linears.values():
        linear.weight.data[:, 0] *= 6
    task = replace(task, inputs=task.inputs.index_fill(2, torch.tensor([0]), 0.01))
    task = replace(task, wanted=task.block(task.inputs))

    def error(results):
        weights = {f"{name}.weight": result.weight for name, result in results.items()}
        out = torch.cat([task.call(task.block, sample[None], weights) for sample in task.inputs])
        return (out - task.wanted).square().mean()

    start, learned = (run(OmniQuant(2, 128, epochs=epochs, lr=0.1), task) for epochs in (0, 40))
    assert error(learned) < 0.8 * error(start)


# QuIP


def test_two_factors():
    assert [two_factors(size) for size in (576, 1536, 192, 7, 1)] == [(24, 24), (32, 48), (24, 8), (7, 1), (1, 1)]


@pytest.mark.parametrize("size", [1, 2, 7, 24, 36])
def test_rotation_is_orthogonal_and_dense(size):
    matrix = random_orthogonal(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)
    assert (matrix.abs() > 1e-6).float().mean() > 0.9
    assert not matrix.equal(random_orthogonal(size, torch.Generator().manual_seed(1))) or size == 1


def test_ldlq_is_its_definition():
    """Algorithm 3 of the paper as its authors write it: H = L D L^T, feedback from the channels after j."""
    codes, curvature = 3 * torch.rand(6, 20, generator=torch.Generator().manual_seed(0)), correlated_moments(20)
    lower = torch.linalg.cholesky(curvature)
    feedback = lower / lower.diagonal() - torch.eye(20)
    expected = codes.clone()
    for j in reversed(range(20)):
        expected[:, j] = (codes[:, j] + (codes[:, j:] - expected[:, j:]) @ feedback[j:, j] + 0.5).floor().clamp(0, 3)
    assert ldlq(codes, curvature, 3).equal(expected)


def test_quip_undoes_its_rotation():
    """With ever finer codes the weight comes back."""
    weight, moments = normal(24, 36), correlated_moments(36)
    coarse, fine = (Quip(bits, span=6.0).quantize(weight, moments, torch.Generator()).weight for bits in (4, 14))
    assert (fine - weight).abs().max() < 1e-2
    assert (coarse - weight).abs().max() > 1e-2


def test_quip_helps_where_weights_are_outliers():
    """One large weight would stretch a row's whole grid; rotated, it is spread out."""
    weight, moments = normal(48, 64), correlated_moments(64)
    weight[torch.arange(48), torch.arange(48)] = 12.0
    quip = Quip(2).quantize(weight, moments, torch.Generator().manual_seed(0)).weight
    assert output_error(weight, quip, moments) < output_error(
        weight, Gptq(2, None).quantize(weight, moments).weight, moments
    )


def test_quip_depends_on_its_seed():
    task = pair_task(cols=32)
    assert not run(Quip(2), task, seed=0)["one"].weight.equal(run(Quip(2), task, seed=1)["one"].weight)


# OWQ


def test_weak_counts_of_llama_7b():
    """Equal numbers of float16 weights in every linear: 6 columns of 4096 rows, 2 of 11008."""
    shapes = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
    shapes |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert weak_counts(weights, 3, 3.01) == {"q": 6, "k": 6, "v": 6, "o": 6, "gate": 2, "up": 2, "down": 6}


def test_search_grid_by_hand():
    """Levels -2, 0, 2, 4 of one value each: found exactly at half the range's steps, with 0 at code 1."""
    values = torch.tensor([[-2.0, 0.0, 2.0, 4.0]])
    grid = search_grid(values, 2, 100)
    assert (grid.scale.item(), grid.zero.item()) == (2.0, 1.0)
    assert search_grid(torch.zeros(1, 4), 2, 100).rounded(torch.zeros(1, 4)).eq(0).all()


def test_searched_grid_beats_minmax():
    weight = normal(70, 300)

    def error(grid):
        return (grid.rounded(weight) - weight).abs().pow(2.4).mean(dim=1)

    assert (error(search_grid(weight, 2, 100)) <= error(minmax_grid(weight, 2)) + 1e-6).all()


def test_owq_keeps_weak_columns_and_rounds_the_others():
    weight, moments = normal(16, 64), torch.eye(64)
    moments[[5, 40], [5, 40]] = 1e4
    result = Owq(3, 3.01).quantize(weight, moments, 2)
    changed = (result.weight - weight).abs() > 2e-3 * weight.abs()
    assert not changed[:, [5, 40]].any() and changed[:, :5].float().mean() > 0.9
    others = [column for column in range(64) if column not in (5, 40)]
    assert all(len(row.unique()) <= 8 for row in result.weight[:, others])
    codes, vectors = 16 * 62 * 3, 16 * (16 + 3)
    assert sum(result.bits.values()) == codes + 16 * 2 * 16 + 2 * 16 + vectors


# SmoothQuant


def test_smoothing_by_hand():
    """Inputs up to 16, weights up to 4: 4 / 2."""
    assert smoothing(torch.tensor([16.0]), torch.tensor([4.0]), 0.5).tolist() == [2.0]
    assert round_tokens(torch.tensor([[7.0, -2.4, 1.6], [0.0, 0.0, 0.0]]), torch.ones(3), 4).tolist() == [
        [7.0, -2.0, 2.0],
        [0.0, 0.0, 0.0],
    ]


def test_smoothquant_smooths_what_comes_from_a_norm():
    model = build(FAMILIES["llama"]())
    seen = {}

    class Watched(SmoothQuant):
        def __call__(self, task, generator):
            seen["from_norm"] = inspect_inputs(task)[1]
            return super().__call__(task, generator)

    result = apply_baseline(model, TOKENS, Watched(), seed=0, device=CPU)
    assert seen["from_norm"] == {f"self_attn.{x}_proj" for x in "qkv"} | {"mlp.gate_proj", "mlp.up_proj"}
    assert len(result.hooks) == 2 * 7
    with torch.no_grad():
        rounded = model(TOKENS).logits
        for hook in result.hooks:
            hook.remove()
        assert not model(TOKENS).logits.equal(rounded)


def test_smoothquant_is_exact_with_many_bits():
    task = pair_task(cols=32)
    for name, result in run(SmoothQuant(bits=14), task).items():
        inputs = normal(5, task.linears[name].in_features)
        torch.testing.assert_close(
            result.round_input(inputs) @ result.weight.T, task.linears[name](inputs), rtol=1e-2, atol=1e-2
        )


# All of them

# The same methods, with less searching and learning where that takes long.
QUICK = BASELINES | {
    name: replace(baseline, epochs=2) for name, baseline in BASELINES.items() if isinstance(baseline, OmniQuant)
}
QUICK |= {name: replace(baseline, steps=8) for name, baseline in BASELINES.items() if isinstance(baseline, Owq)}
ONE_EACH = {type(baseline).__name__: name for name, baseline in BASELINES.items()}.values()  # a setting of each method


@pytest.mark.parametrize("name", BASELINES)
def test_every_linear_is_there_finite_and_counted(name):
    """Channels that are always zero, a row of zeros, and sizes that no group divides."""
    task = pair_task(dead=(0, 5, 159))
    task.block.one.weight.data[3] = 0.0
    results = run(QUICK[name], task)
    assert list(results) == list(task.linears)
    for linear, result in results.items():
        assert result.weight.shape == task.linears[linear].weight.shape
        assert result.weight.isfinite().all()
        assert all(isinstance(bits, int) and bits >= 0 for bits in result.bits.values()) and result.bits["codes"] > 0


@pytest.mark.parametrize("name", ONE_EACH)
def test_depends_on_its_generator_alone(name):
    first = run(QUICK[name], pair_task(cols=64))
    torch.manual_seed(123)
    again = run(QUICK[name], pair_task(cols=64))
    assert all(first[linear].weight.equal(again[linear].weight) for linear in first)


@pytest.mark.parametrize("name", ONE_EACH)
def test_block_keeps_its_weights_and_hooks(name):
    task = pair_task(cols=64)
    before = {name: linear.weight.clone() for name, linear in task.linears.items()}
    run(QUICK[name], task)
    for linear, weight in before.items():
        assert task.linears[linear].weight.equal(weight)
        assert not task.linears[linear]._forward_pre_hooks and not task.linears[linear]._forward_hooks


EXPECTED_BITS = {  # (rows, cols) -> bits, from the shapes alone; those that depend on the values have their own tests
    "rtn-w2": lambda r, c: 2 * r * c + r * 18,
    "rtn-w2g128": lambda r, c: 2 * r * c + r * -(-c // 128) * 18,
    "gptq-w2": lambda r, c: 2 * r * c + r * 18,
    "gptq-w2g128": lambda r, c: 2 * r * c + r * -(-c // 128) * 18,
    "gptq-w3g128": lambda r, c: 3 * r * c + r * -(-c // 128) * 19,
    "gptq-w4g128": lambda r, c: 4 * r * c + r * -(-c // 128) * 20,
    "billm": lambda r, c: 2 * r * c + c + r * -(-c // 128) * 7 * 16,
    "omniquant-w2g128": lambda r, c: 2 * r * c + r * -(-c // 128) * 18,
    "omniquant-w2g64": lambda r, c: 2 * r * c + r * -(-c // 64) * 18,
    "quip-w2": lambda r, c: 2 * r * c + 16 * c + 32 + 64,
    "owq-w3": lambda r, c: 3 * r * c + r * 19,  # too small for a weak column, which would add (16 - 3) * r + 16
    "smoothquant-w4a4": lambda r, c: 4 * r * c + 16 * r,
}


@pytest.mark.parametrize("name", EXPECTED_BITS)
def test_bits_follow_from_shapes(name):
    task = pair_task(cols=160)
    for linear, result in run(QUICK[name], task).items():
        assert sum(result.bits.values()) == EXPECTED_BITS[name](*task.linears[linear].weight.shape)


# The walk


class Halve(Baseline):
    """Every weight halved; the inputs it was given are kept."""

    claimed_bits = 16.0

    def __init__(self):
        self.tasks = []

    def __call__(self, task, generator):
        self.tasks.append((task, generator.initial_seed()))
        plain = RoundToNearest(8, None)(task, generator)
        return {name: replace(plain[name], weight=task.linears[name].weight / 2) for name in plain}


def hidden_states(model):
    with torch.no_grad():
        return torch.stack(model(TOKENS, output_hidden_states=True).hidden_states[:-1])


def test_walk_calibrates_on_the_quantized_stream():
    model, original = build(FAMILIES["llama"]()), build(FAMILIES["llama"]())
    baseline = Halve()
    result = apply_baseline(model, TOKENS, baseline, seed=3, device=CPU)
    for (name, linear), before in zip(model.model.layers.named_modules(), original.model.layers.modules(), strict=True):
        if isinstance(linear, nn.Linear):
            assert linear.weight.equal(before.weight / 2), name
    torch.testing.assert_close(torch.stack([t.inputs for t, _ in baseline.tasks]), hidden_states(model))
    torch.testing.assert_close(baseline.tasks[0][0].wanted, hidden_states(original)[1])
    assert [seed for _, seed in baseline.tasks] == [3 * 1_000_003, 3 * 1_000_003 + 1]
    assert [record["index"] for record in result.blocks] == [0, 1]
    assert not result.hooks


def test_bits_are_those_of_all_linears():
    model = build(FAMILIES["llama"]())
    result = apply_baseline(model, TOKENS, RoundToNearest(2, None), seed=0, device=CPU)
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert result.weights == sum(linear.weight.numel() for linear in linears)
    assert result.parts["codes"] == 2 * result.weights
    rows = sum(linear.out_features for linear in linears)
    assert result.bits_per_weight == 2 + rows * 18 / result.weights


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_walk_runs_every_method(name, family):
    model = build(FAMILIES[family]())
    result = apply_baseline(model, TOKENS, QUICK[name], seed=0, device=CPU)
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()
    assert all(0 < record["loss"] < 10 for record in result.blocks)
    assert result.bits_per_weight > QUICK[name].claimed_bits


def test_weights_that_are_not_finite_are_refused():
    class Broken(Halve):
        def __call__(self, task, generator):
            results = super().__call__(task, generator)
            return {name: replace(result, weight=result.weight / 0) for name, result in results.items()}

    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        apply_baseline(build(FAMILIES["llama"]()), TOKENS, Broken(), seed=0, device=CPU)


def test_no_name_means_two_methods():
    assert not BASELINES.keys() & METHODS.keys()
