"""Latent weights: the forward pass is what a file would hold, the backward pass is straight through."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq161 import latent
from ptq161.binarize import FOUR_BIT, ONE_BIT, TERNARY, ColumnGroup, QuantizedWeight, nearest_level, reconstruct, stored
from ptq161.kernels import cpu_kernels
from ptq161.latent import SMALLEST_SCALE, LatentWeight

CPU = torch.device("cpu")
WIDTHS = (ONE_BIT, TERNARY, FOUR_BIT)
STEPS = {ONE_BIT: 0.8, TERNARY: 1.2, FOUR_BIT: 0.17}  # a scale that suits a normal variable


@pytest.fixture(autouse=True, scope="module", params=["kernel", "torch"])
def arithmetic(request):
    """Every test runs on the kernel, where it is built, and on torch operations."""
    if request.param == "kernel":
        if not cpu_kernels():
            pytest.skip("the native extension is not built")
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "has_rounding_kernel", lambda *_: False)
        yield


def start(rows, sizes, seed=0, widths=WIDTHS):
    """Random column groups in random places with random scales; their codes do not matter to a LatentWeight."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(sizes), generator=generator)
    groups = []
    for columns, width in zip(order.split(sizes), widths, strict=True):
        scale = stored(STEPS[width] * (0.5 + torch.rand(rows, 1, generator=generator)))
        codes = torch.zeros(rows, len(columns), dtype=torch.int8)
        groups.append(ColumnGroup(columns.sort().values, width, codes, scale))
    return QuantizedWeight(tuple(groups))


def latent_weight(rows=5, sizes=(4, 6, 3), seed=0, widths=WIDTHS):
    """A latent weight whose latents and gains have moved away from their start."""
    generator = torch.Generator().manual_seed(seed + 1)
    latents = LatentWeight.of(torch.randn(rows, sum(sizes), generator=generator), start(rows, sizes, seed, widths))
    with torch.no_grad():
        latents.latent.add_(torch.randn(latents.latent.shape, generator=generator), alpha=0.3)
        latents.gain.mul_(0.8 + 0.4 * torch.rand(latents.gain.shape, generator=generator))
    return latents


def one_group(values, width, scale=1.0):
    """A single row of one column group, columns in natural order."""
    weight = torch.tensor([values])
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    group = ColumnGroup(torch.arange(len(values)), width, codes, torch.tensor([[scale]]))
    return LatentWeight.of(weight, QuantizedWeight((group,)))


def gradients(latents, upstream):
    """(of the latents, of the gains) for a loss whose gradient at the dense weight is `upstream`."""
    latents.dense(torch.float32).backward(upstream)
    return latents.latent.grad, latents.gain.grad


# Forward


@given(st.integers(1, 6), st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 10_000))
def test_dense_is_the_quantized_weight_bit_for_bit(rows, sizes, seed):
    latents = latent_weight(rows, sizes, seed)
    dense, kept = latents.dense(torch.float32), reconstruct(latents.quantized())
    assert dense.equal(kept)
    assert dense.detach().view(torch.int32).equal(kept.view(torch.int32)), "zeros of another sign"
    assert latents.dense(torch.bfloat16).equal(kept.to(torch.bfloat16))


def test_start_is_the_original_weight_in_natural_order():
    """Every channel is rounded on the scale of its own group, and lands where it came from."""
    weight, begun = torch.randn(4, 9, generator=torch.Generator().manual_seed(3)), start(4, (2, 4, 3))
    latents = LatentWeight.of(weight, begun)
    dense = latents.dense(torch.float32)
    for group in begun.groups:
        expected = nearest_level(weight[:, group.columns] / group.scale, group.width) * group.scale
        assert dense[:, group.columns].equal(expected)
    assert latents.latent.equal(weight[:, torch.cat([group.columns for group in begun.groups])])
    assert latents.gain.equal(torch.ones(4, 3))
    kept = latents.quantized()
    assert [group.columns.tolist() for group in kept.groups] == [group.columns.tolist() for group in begun.groups]
    assert [group.width for group in kept.groups] == [group.width for group in begun.groups]


def test_start_leaves_the_original_alone():
    weight, begun = torch.randn(3, 6), start(3, (2, 2, 2))
    before, scale = weight.clone(), begun.groups[0].scale.clone()
    latents = LatentWeight.of(weight, begun)
    with torch.no_grad():
        latents.latent.add_(1)
        latents.gain.mul_(2)
    assert weight.equal(before) and begun.groups[0].scale.equal(scale)


def test_codes_are_levels_of_their_width_and_scales_are_float16():
    kept = latent_weight(6, (8, 10, 6)).quantized()
    for group, levels in zip(kept.groups, ({-1, 1}, {-1, 0, 1}, set(range(-15, 16, 2))), strict=True):
        assert group.codes.dtype == torch.int8 and set(group.codes.unique().tolist()) <= levels
        assert group.scale.equal(group.scale.half().float()) and not group.scale.requires_grad
        assert group.zero is group.mean is group.row is group.col is None


def test_sign_of_zero_is_plus_whichever_zero():
    latents = one_group([0.0, -0.0, 1e-30, -1e-30], ONE_BIT, scale=0.5)
    assert latents.dense(torch.float32).tolist() == [[0.5, 0.5, 0.5, -0.5]]
    assert latents.quantized().groups[0].codes.tolist() == [[1, 1, 1, -1]]


@pytest.mark.parametrize("gain", [1.0, 1e-9, 0.0, -3.0])
def test_scale_never_falls_below_the_smallest_of_float16(gain):
    latents = one_group([0.3, -0.2], TERNARY, scale=SMALLEST_SCALE)
    with torch.no_grad():
        latents.gain.fill_(gain)
    assert latents.scales().item() == SMALLEST_SCALE == float(torch.tensor(SMALLEST_SCALE).half()) > 0
    assert latents.quantized().groups[0].scale.item() == SMALLEST_SCALE
    assert latents.dense(torch.float32).tolist() == [[SMALLEST_SCALE, -SMALLEST_SCALE]]


# Backward


def test_gradients_are_straight_through_by_hand():
    """Levels -1, 0, 1 at scale 2: the ratios are 0.25, -0.75, 1.4 and 2, the last beyond the outermost cell (1.5)."""
    latents = one_group([0.5, -1.5, 2.8, 4.0], TERNARY, scale=2.0)
    to_latent, to_gain = gradients(latents, torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert to_latent.tolist() == [[1.0, 10.0, 100.0, 0.0]]
    # Of the scale: level - ratio inside, the level itself beyond; times the base of 2 for the gain.
    expected = 2 * (1 * (0 - 0.25) + 10 * (-1 + 0.75) + 100 * (1 - 1.4) + 1000 * 1)
    assert to_gain.item() == pytest.approx(expected, rel=1e-6)


def test_gradients_of_signs_by_hand():
    """Both levels are outermost, so every latent learns, and the scale's gradient is the sign alone."""
    latents = one_group([0.1, -7.0, 0.0, 30.0], ONE_BIT, scale=2.0)
    to_latent, to_gain = gradients(latents, torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert to_latent.tolist() == [[1.0, 10.0, 100.0, 1000.0]]
    assert to_gain.item() == pytest.approx(2 * (1 - 10 + 100 + 1000))


@pytest.mark.parametrize(("width", "edge"), [(TERNARY, 1.5), (FOUR_BIT, 16.0)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_latents_beyond_the_outermost_cell_get_no_gradient(width, edge, sign):
    scale = 0.5
    inside, beyond = sign * (edge - 0.01) * scale, sign * (edge + 0.01) * scale
    to_latent, _ = gradients(one_group([inside, beyond, 1e6 * sign], width, scale), torch.ones(1, 3))
    assert to_latent.tolist() == [[1.0, 0.0, 0.0]]


@given(st.integers(0, 10_000))
def test_gradients_are_those_of_the_straight_through_formula(seed):
    """Against autograd on w = level(x) * s with the rounding error of x = latent / s held fixed."""
    latents = latent_weight(4, (5, 6, 4), seed)
    upstream = torch.randn(4, 15, generator=torch.Generator().manual_seed(seed))
    to_latent, to_gain = gradients(latents, upstream)

    latent = latents.latent.detach().clone().requires_grad_()
    gain = latents.gain.detach().clone().requires_grad_()
    scale = latents.base * gain
    scale = scale + (latents.scales() - scale).detach()  # float16 rounding is straight through as well
    dense = torch.zeros(4, 15)
    parts = zip(
        latent.split(latents.sizes, 1), scale.split(1, 1), latents.columns.split(latents.sizes), WIDTHS, strict=True
    )
    for part, s, columns, width in parts:
        ratio = part / s
        levels = nearest_level(ratio.detach(), width)
        if width is ONE_BIT:
            values = levels * s + (part - part.detach())
        else:
            edge = -width.lowest + width.step / 2
            values = (ratio.clamp(-edge, edge) + (levels - ratio.clamp(-edge, edge)).detach()) * s
        dense = dense.index_copy(1, columns, values)
    dense.backward(upstream)
    torch.testing.assert_close(to_latent, latent.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(to_gain, gain.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("width", "values"), [(ONE_BIT, [0.3, -2.0, 5.0]), (TERNARY, [9.0, -8.0]), (FOUR_BIT, [99.0])])
def test_scale_gradient_is_the_slope_where_codes_stay(width, values):
    """With codes that no small step changes, the forward pass is linear in the scale: finite differences agree."""
    latents = one_group(values, width, scale=1.0)
    upstream = torch.randn(1, len(values), generator=torch.Generator().manual_seed(0))
    _, to_gain = gradients(latents, upstream)
    losses = []
    for gain in (1 - 2**-6, 1 + 2**-6):  # both exact in float16
        with torch.no_grad():
            latents.gain.fill_(gain)
            losses.append((latents.dense(torch.float32) * upstream).sum())
    assert to_gain.item() == pytest.approx((losses[1] - losses[0]).item() / 2**-5, rel=1e-4)


def test_bfloat16_weights_take_bfloat16_gradients():
    latents = latent_weight()
    upstream = torch.randn(5, 13, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    latents.dense(torch.bfloat16).backward(upstream)
    expected = latent_weight()
    expected.dense(torch.float32).backward(upstream.float())
    assert latents.latent.grad.dtype == latents.gain.grad.dtype == torch.float32
    assert latents.latent.grad.equal(expected.latent.grad) and latents.gain.grad.equal(expected.gain.grad)


# Moving


def test_moved_weight_has_leaves_of_its_own():
    latents = latent_weight()
    latents.dense(torch.float32).sum().backward()
    moved = latents.to(CPU)
    assert moved.dense(torch.float32).equal(latents.dense(torch.float32))
    assert (moved.widths, moved.sizes) == (latents.widths, latents.sizes)
    for name in ("latent", "gain"):
        leaf = getattr(moved, name)
        assert leaf is not getattr(latents, name)
        assert leaf.is_leaf and leaf.requires_grad and leaf.grad is None
    assert not moved.base.requires_grad and moved.columns.equal(latents.columns)
    assert latents.to(torch.device("meta")).latent.device.type == "meta"
