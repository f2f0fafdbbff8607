"""Adapters on tensors: targets, merging, the grid to train through, and how salient weights are counted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq161.adapters import (
    CHANNEL_SHARE,
    SALIENT_SHARE,
    concentration,
    merged_weight,
    on_grid,
    salient_counts,
    target_linears,
)
from ptq161.binarize import SalientRange, as_stored, quantize_weight, reconstruct
from ptq161.errors import InputError
from ptq161.mixed import group_columns, mixed_weight

LINEARS = [
    f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def paper_grid(weight, count):
    salient = torch.zeros(weight.shape[1], dtype=torch.bool)
    salient[:count] = True
    return as_stored(quantize_weight(weight, salient, salient_range=SalientRange.SALIENT, row_mean=True))


def test_by_default_only_what_ends_attention_has_no_adapter():
    assert target_linears(LINEARS, ()) == [name for name in LINEARS if "o_proj" not in name]


def test_targets_are_last_names():
    assert target_linears(LINEARS, ("o_proj",)) == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    ]


def test_an_unknown_target_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"'qproj'; expected targets among: q_proj, o_proj, up_proj"):
        target_linears(LINEARS, ("up_proj", "qproj"))


def test_merging_by_hand():
    weight, down, up = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0], [0.0]])
    assert merged_weight(weight, down, up, 0.25).tolist() == [[1.5, 1.5], [3.0, 4.0]]


@given(st.integers(1, 9), st.integers(2, 13), st.integers(0, 99))
def test_a_weight_of_the_grid_stays_where_it_is(rows, cols, seed):
    weight = random(rows, cols, seed=seed)
    widths = [("1bit", cols - cols // 2), ("4bit", cols // 2)]
    mixed = mixed_weight(weight, group_columns(weight.square().sum(0), widths), widths, torch.ones(cols))
    for grid in (paper_grid(weight, cols // 3), mixed):
        torch.testing.assert_close(on_grid(reconstruct(grid), grid), reconstruct(grid), rtol=1e-6, atol=1e-6)


def test_a_moved_weight_takes_the_nearest_level():
    grid = paper_grid(random(4, 6), 2)
    here = reconstruct(grid)
    codes = {id(group): group.codes for group in grid.groups}
    assert torch.equal(on_grid(here + 1e-3 * random(4, 6, seed=1), grid), on_grid(here, grid))
    signs = grid.groups[0]
    moved = here.clone()
    moved[:, signs.columns] = 2 * signs.mean - here[:, signs.columns]  # to the other side of the mean
    expected = here.clone()
    expected[:, signs.columns] = -signs.codes * signs.scale + signs.mean
    torch.testing.assert_close(on_grid(moved, grid), expected)
    assert all(codes[id(group)] is group.codes for group in grid.groups)


def test_the_gradient_passes_the_grid_unchanged():
    weight = random(4, 6).requires_grad_()
    wanted = random(4, 6, seed=2)
    (on_grid(weight, paper_grid(weight.detach(), 2)) * wanted).sum().backward()
    assert torch.equal(weight.grad, wanted)


def test_a_factor_of_zero_gives_no_nan():
    grid = paper_grid(torch.zeros(3, 5), 2)
    assert on_grid(random(3, 5), grid).isfinite().all()


def test_concentration_of_whole_channels_and_of_an_even_spread():
    weight = random(200, 100) * 0.01
    weight[:, :5] = 1.0
    assert concentration(weight) == 1.0
    even = torch.zeros(100, 100)
    even[torch.arange(100), torch.arange(100)] = 1.0  # one large weight in every channel
    even[torch.arange(100), (torch.arange(100) + 1) % 100] = 1.0
    even = even + torch.roll(even, 2, 1) + torch.eye(100).roll(4, 1)
    assert even.count_nonzero() == SALIENT_SHARE * even.numel()
    assert concentration(even) == pytest.approx(CHANNEL_SHARE)


def test_salient_counts_have_channels_downwards():
    weight = random(40, 20) * 0.01
    weight[:, 3] = 1.0
    counts = salient_counts(weight, 10)
    assert counts.shape == (10, 10) and counts.sum() == SALIENT_SHARE * weight.numel()
    assert counts[1].tolist() == [4] * 10  # channels 2 and 3
    assert salient_counts(weight, 64).shape == (20, 40)
