"""The mixed start point: which channels get which width, and the best row scales for them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq161.binarize import FOUR_BIT, ONE_BIT, TERNARY, nearest_level, reconstruct
from ptq161.latent import SMALLEST_SCALE
from ptq161.mixed import best_scale, group_columns, mixed_weight
from ptq161.packing import pack, unpack

SHAPES = ("normal", "laplace")  # what rows of trained weights look like


def rows_of(shape, rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    normal, uniform = torch.randn(rows, cols, generator=generator), torch.rand(rows, cols, generator=generator)
    if shape == "laplace":
        return normal.sign() * -uniform.clamp(min=1e-6).log()
    return normal


def weighted_error(part, scale, width, squares):
    """Per row: sum over channels of squares * (level * scale - weight)^2; scales broadcast."""
    return ((nearest_level(part / scale, width) * scale - part).square() * squares).sum(-1)


# Which channels


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_every_group_gets_its_count_even_when_all_are_equal(values, data):
    first = data.draw(st.integers(0, len(values)))
    second = data.draw(st.integers(0, len(values) - first))
    widths = [("1bit", first), ("ternary", second), ("4bit", len(values) - first - second)]
    importance = torch.tensor(values, dtype=torch.float32)
    groups = group_columns(importance, widths)
    assert [len(columns) for columns in groups] == [count for _, count in widths]
    assert sorted(torch.cat(groups).tolist()) == list(range(len(values)))
    assert all(columns.tolist() == sorted(columns.tolist()) for columns in groups)
    # (importance, -index) of everything in a later group is above that of everything in an earlier one.
    keys = [[(values[index], -index) for index in columns.tolist()] for columns in groups]
    for lower, higher in ((0, 1), (0, 2), (1, 2)):
        assert not keys[lower] or not keys[higher] or max(keys[lower]) < min(keys[higher])


def test_the_most_important_channels_get_four_bits():
    importance = torch.tensor([5.0, 1.0, 9.0, 1.0, 7.0, 3.0])
    groups = group_columns(importance, [("1bit", 2), ("ternary", 3), ("4bit", 1)])
    assert [columns.tolist() for columns in groups] == [[1, 3], [0, 4, 5], [2]]


# Which scales


@given(st.sampled_from(SHAPES), st.sampled_from([ONE_BIT, TERNARY, FOUR_BIT]), st.booleans(), st.integers(0, 1000))
def test_scale_is_as_good_as_brute_force(shape, width, weighted, seed):
    """Against six hundred scales from far below to far above the row's size."""
    part = rows_of(shape, 3, 400, seed)
    squares = torch.rand(400, generator=torch.Generator().manual_seed(seed)).square() if weighted else torch.ones(400)
    found = weighted_error(part, best_scale(part, width, squares), width, squares)
    shares = torch.logspace(-2.5, 0.2, 600)[:, None]
    tried = [weighted_error(row.expand(600, -1), shares * row.abs().max(), width, squares) for row in part]
    best = torch.stack([errors.min() for errors in tried])
    # Signs have a closed form; the error of sixteen levels has many minima, and the search is coarse.
    slack = {ONE_BIT: 1.0001, TERNARY: 1.01, FOUR_BIT: 1.05}[width]
    assert (found <= slack * best).all(), (found / best).max()


@pytest.mark.parametrize("width", [TERNARY, FOUR_BIT])
@pytest.mark.parametrize("cols", [40, 400])
@pytest.mark.parametrize("outlier", [10.0, 30.0, 100.0])
def test_scale_of_a_row_with_one_huge_weight_is_as_good_as_brute_force(width, cols, outlier):
    """Its mean square is mostly the outlier's, and says little about where the other weights lie."""
    part = rows_of("normal", 6, cols, 0)
    part[:, 0] = outlier
    found = weighted_error(part, best_scale(part, width, torch.ones(cols)), width, torch.ones(cols))
    shares = torch.logspace(-4, 0.2, 1500)[:, None]
    best = torch.stack(
        [weighted_error(r.expand(1500, -1), shares * outlier, width, torch.ones(cols)).min() for r in part]
    )
    assert (found <= 1.05 * best).all(), (found / best).max()


def test_scale_of_signs_is_the_weighted_mean_magnitude():
    part, squares = torch.tensor([[1.0, -3.0, 8.0]]), torch.tensor([1.0, 1.0, 2.0])
    assert best_scale(part, ONE_BIT, squares).item() == pytest.approx((1 + 3 + 16) / 4, rel=1e-5)


@pytest.mark.parametrize("width", [ONE_BIT, TERNARY, FOUR_BIT])
def test_scale_follows_the_size_of_the_row(width):
    part, squares = rows_of("normal", 4, 40, 0), torch.ones(40)
    one, larger = best_scale(part, width, squares), best_scale(1024 * part, width, squares)
    torch.testing.assert_close(larger, 1024 * one)
    assert best_scale(part, width, 1e6 * squares).equal(one)  # only ratios of the inputs' squares matter


@pytest.mark.parametrize("width", [ONE_BIT, TERNARY, FOUR_BIT])
@pytest.mark.parametrize(("part", "squares"), [(torch.zeros(2, 4), torch.ones(4)), (torch.ones(2, 4), torch.zeros(4))])
def test_zeros_give_a_usable_scale(width, part, squares):
    scale = best_scale(part, width, squares)
    assert scale.isfinite().all() and (scale >= SMALLEST_SCALE).all()
    assert weighted_error(part, scale, width, torch.ones(4)).max() < 1e-3


# The whole weight


@given(st.integers(1, 5), st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 1000))
def test_mixed_weight_is_rounded_to_its_groups_and_survives_packing(rows, counts, seed):
    widths = list(zip(("1bit", "ternary", "4bit"), counts, strict=True))
    weight = rows_of("normal", rows, sum(counts), seed)
    squares = torch.rand(sum(counts), generator=torch.Generator().manual_seed(seed))
    columns = group_columns(squares, widths)
    mixed = mixed_weight(weight, columns, widths, squares)
    assert [(group.width.name, len(group.columns)) for group in mixed.groups] == widths
    for group, chosen in zip(mixed.groups, columns, strict=True):
        assert group.columns.equal(chosen)
        assert group.zero is group.mean is group.row is group.col is None
        assert group.scale.equal(group.scale.half().float())
        assert group.codes.equal(nearest_level(weight[:, chosen] / group.scale, group.width).to(torch.int8))
    assert reconstruct(unpack(pack(mixed))).equal(reconstruct(mixed))


def test_wider_groups_lose_less():
    weight, squares = rows_of("normal", 20, 600, 0), torch.ones(600)
    errors = []
    for name in ("1bit", "ternary", "4bit"):
        mixed = mixed_weight(weight, [torch.arange(600)], [(name, 600)], squares)
        errors.append(((reconstruct(mixed) - weight).square().mean() / weight.square().mean()).item())
    # Max (1960): 0.3634, 0.1902 and 0.0115 for a standard normal variable.
    assert errors == pytest.approx([0.3634, 0.1902, 0.01154], rel=0.03)
