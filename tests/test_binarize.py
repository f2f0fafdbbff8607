"""The algorithm on tensors: properties first, then matrices worked out by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq161.binarize import (
    CODE_WIDTHS,
    EIGHT_BIT,
    FOUR_BIT,
    ONE_BIT,
    TERNARY,
    ColumnGroup,
    QuantizedWeight,
    as_stored,
    binarized_group,
    folded_rows,
    nearest_level,
    quantize_weight,
    reconstruct,
    salient_columns,
    salient_count,
    salient_group,
    stored,
    symmetric_weight,
)
from ptq161.config import SalientRange

MIXED_WIDTHS = (ONE_BIT, TERNARY, FOUR_BIT)


def random_weight(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def random_group(columns, rows, width, generator, *, zero=False, mean=False, row=False, col=False, dtype=torch.float64):
    """A column group with every vector drawn at random, those not asked for left out."""

    def factor(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    digits = torch.randint(width.count, (rows, len(columns)), generator=generator)
    levels = torch.randint(width.count, (rows, 1), generator=generator)
    return ColumnGroup(
        columns=columns,
        width=width,
        codes=(width.lowest + width.step * digits).to(torch.int8),
        scale=factor(rows, 1),
        zero=(width.lowest + width.step * levels).to(dtype) if zero else None,
        mean=factor(rows, 1) if mean else None,
        row=factor(rows, 1) if row else None,
        col=factor(1, len(columns)) if col else None,
    )


def random_quantized(rows, cols, salient, seed, dtype=torch.float64):
    """The paper's two groups on `cols` shuffled channels, `salient` of them at 4 bits."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(cols, generator=generator)
    groups = []
    if salient < cols:
        columns = order[salient:].sort().values
        groups.append(random_group(columns, rows, ONE_BIT, generator, mean=True, row=True, col=True, dtype=dtype))
    if salient:
        columns = order[:salient].sort().values
        groups.append(random_group(columns, rows, FOUR_BIT, generator, zero=True, dtype=dtype))
    return QuantizedWeight(tuple(groups))


def random_mixed(rows, sizes, seed):
    """Groups of sizes[0] 1bit, sizes[1] ternary and sizes[2] 4bit channels, shuffled, with a row scale each."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randperm(sum(sizes), generator=generator).split(sizes)
    return QuantizedWeight(
        tuple(
            random_group(columns.sort().values, rows, width, generator, dtype=torch.float32)
            for columns, width in zip(parts, MIXED_WIDTHS, strict=True)
        )
    )


# The structured mask


@given(values=st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), min_size=1, max_size=60), data=st.data())
def test_mask_has_exactly_count_columns_under_ties(values, data):
    count = data.draw(st.integers(0, len(values)))
    importance = torch.tensor(values)
    salient = salient_columns(importance, count)
    assert int(salient.sum()) == count
    if 0 < count < len(values):
        assert importance[salient].min() >= importance[~salient].max()
    border = importance[salient].min() if count else None
    tied = (importance == border).nonzero().squeeze(1) if count else torch.tensor([])
    chosen = [bool(salient[index]) for index in tied.long()]
    assert chosen == sorted(chosen, reverse=True), "among equals the lower channel wins"


def test_mask_by_hand():
    assert salient_columns(torch.tensor([1.0, 5.0, 5.0, 0.0, 5.0]), 2).tolist() == [False, True, True, False, False]


@given(cols=st.integers(1, 30_000), data=st.data())
def test_count_survives_the_way_through_a_ratio(cols, data):
    count = data.draw(st.integers(0, cols))
    assert salient_count(count / cols, cols) == count


def test_count_is_rounded_down():
    assert [salient_count(ratio, 576) for ratio in (0.0, 0.2, 0.999, 1.0)] == [0, 115, 575, 576]


# Binarized columns (Eq. 2 and 9)

WEIGHT = torch.tensor(
    [
        [4.0, 9.0, 1.0, 1.0],  # centred by 2: the ones turn negative
        [-1.0, 9.0, -2.0, 3.0],  # mean 0
        [0.0, 0.0, 0.0, 0.0],  # all zero
        [-2.0, 9.0, -2.0, -2.0],  # constant
    ]
)
COLUMNS = torch.tensor([0, 2, 3])


def test_centred_binarization_by_hand():
    group = binarized_group(WEIGHT, COLUMNS, row_mean=True)
    assert group.codes.tolist() == [[1, -1, -1], [-1, -1, 1], [1, 1, 1], [1, 1, 1]]
    assert group.mean.tolist() == [[2.0], [0.0], [0.0], [-2.0]]
    assert group.scale.tolist() == [[2.0], [2.0], [0.0], [2.0]]
    assert group.row.tolist() == [[1.0]] * 4
    assert group.col.tolist() == [[1.0, 1.0, 1.0]]
    assert group.width is ONE_BIT
    assert group.zero is None


def test_plain_binarization_by_hand():
    group = binarized_group(WEIGHT, COLUMNS, row_mean=False)
    assert group.codes.tolist() == [[1, 1, 1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1]]
    assert group.mean is None
    assert group.scale.tolist() == [[2.0], [2.0], [0.0], [2.0]]


def test_sign_of_zero_is_plus_one():
    signs = binarized_group(torch.tensor([[0.0, -0.0, 1e-30, -1e-30]]), torch.arange(4), row_mean=False).codes
    assert signs.tolist() == [[1, 1, 1, -1]]


@pytest.mark.parametrize("row_mean", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_zero_and_constant_rows(row_mean, value):
    weight = torch.full((1, 5), value)
    dense = reconstruct(QuantizedWeight((binarized_group(weight, torch.arange(5), row_mean),)))
    # The published code keeps mean |w| of the uncentred row as scale, so a centred constant row starts at twice itself.
    assert dense.equal(weight * (2 if row_mean else 1))


def test_plain_binarization_scale_is_the_best_one():
    """mean |w| minimizes the squared error for these signs (the reason it is the start)."""
    weight = random_weight(6, 40).double()
    group = binarized_group(weight, torch.arange(40), row_mean=False)
    error = (reconstruct(QuantizedWeight((group,))) - weight).square().sum(1)
    for factor in (0.99, 1.01):
        other = replace(group, scale=group.scale * factor)
        assert ((reconstruct(QuantizedWeight((other,))) - weight).square().sum(1) > error).all()


# Salient columns (Eq. 1)


def test_salient_range_by_hand():
    weight = torch.tensor(
        [
            [-1.25, 7.0, 2.5, -0.5],  # salient span -1.25..2.5; whole row -1.25..7
            [1.0, -3.75, 3.75, 0.25],  # all salient positive: the grid is stretched down to zero
            [-3.75, 3.75, -1.0, 0.0],  # all salient negative: stretched up to zero
        ]
    )
    columns = torch.tensor([0, 2])
    own = salient_group(weight, columns, SalientRange.SALIENT)
    assert own.scale.tolist() == [[0.125], [0.125], [0.125]]
    assert own.zero.tolist() == [[-5.0], [-15.0], [15.0]]
    assert own.codes.tolist() == [[-15, 15], [-7, 15], [-15, 7]]
    assert reconstruct_group(own, 4)[:, columns].equal(weight[:, columns])

    whole = salient_group(weight, columns, SalientRange.ROW)
    assert whole.scale.tolist() == [[stored(torch.tensor(8.25 / 30)).item()], [0.25], [0.25]]
    assert whole.zero.tolist() == [[-11.0], [1.0], [1.0]]  # 1.25 / 0.275 - 15 = -10.45; 3.75 / 0.25 - 15 = 0 is a tie
    # Row 0: -4.5 - 11 clamped, 9.1 - 11; row 1: 4 + 1, 15 + 1 clamped; row 2: -15 + 1 is a tie, -4 + 1.
    assert whole.codes.tolist() == [[-15, -1], [5, 15], [-15, -3]]
    assert whole.width is FOUR_BIT
    assert whole.mean is whole.row is whole.col is None


@pytest.mark.parametrize("salient_range", SalientRange)
@pytest.mark.parametrize("value", [0.0, 1e-9, -1e-9])
def test_row_below_float16_becomes_zero(salient_range, value):
    group = salient_group(torch.full((1, 3), value), torch.arange(3), salient_range)
    assert (group.scale.item(), group.zero.item(), group.codes.tolist()) == (1.0, -15.0, [[-15, -15, -15]])
    assert reconstruct_group(group, 3).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("value", [3.0, -3.0])
def test_constant_row_is_kept(value):
    group = salient_group(torch.full((1, 3), value), torch.arange(3), SalientRange.SALIENT)
    torch.testing.assert_close(reconstruct_group(group, 3), torch.full((1, 3), value), rtol=1e-3, atol=0)


@given(seed=st.integers(0, 1000), rows=st.integers(1, 5), cols=st.integers(1, 20), shift=st.floats(-3, 3))
def test_four_bit_error_is_within_one_step_and_zero_is_on_the_grid(seed, rows, cols, shift):
    weight = random_weight(rows, cols, seed) + shift
    group = salient_group(weight, torch.arange(cols), SalientRange.SALIENT)
    error = (reconstruct_group(group, cols) - weight).abs()
    # Half a step for the code, half for the rounded zero level at the ends; float16 moves the scale by 1/2048 of it.
    assert (error <= FOUR_BIT.step * group.scale * 1.02).all()
    assert set(group.zero.flatten().tolist()) | set(group.codes.flatten().tolist()) <= set(levels_of(FOUR_BIT))
    assert group.scale.equal(stored(group.scale))


def reconstruct_group(group, cols):
    """One group alone on `cols` channels, the others zero."""
    dense = torch.zeros(len(group.codes), cols)
    dense[:, group.columns] = reconstruct(QuantizedWeight((replace(group, columns=torch.arange(len(group.columns))),)))
    return dense


# The formula


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
    optional=st.tuples(*[st.tuples(*[st.booleans()] * 4)] * 3),
)
def test_reconstruct_equals_the_formula_weight_by_weight(seed, rows, sizes, optional):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(sizes), generator=generator)
    groups = tuple(
        random_group(
            columns.sort().values,
            rows,
            width,
            generator,
            **dict(zip(("zero", "mean", "row", "col"), chosen, strict=True)),
        )
        for columns, width, chosen in zip(order.split(sizes), MIXED_WIDTHS, optional, strict=True)
    )
    dense = reconstruct(QuantizedWeight(groups))
    assert dense.shape == (rows, sum(sizes))
    for group in groups:
        for i in range(rows):
            for j, channel in enumerate(group.columns.tolist()):
                zero = 0.0 if group.zero is None else group.zero[i, 0].item()
                mean = 0.0 if group.mean is None else group.mean[i, 0].item()
                row = 1.0 if group.row is None else group.row[i, 0].item()
                col = 1.0 if group.col is None else group.col[0, j].item()
                expected = ((group.codes[i, j].item() - zero) * group.scale[i, 0].item() + mean) * row * col
                assert dense[i, channel].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_reconstruct_is_differentiable_in_every_factor():
    weight = random_quantized(3, 7, salient=2, seed=0)
    binary, salient = weight.groups

    def dense(scale, mean, row, col, salient_scale):
        learned = replace(binary, scale=scale, mean=mean, row=row, col=col)
        return reconstruct(QuantizedWeight((learned, replace(salient, scale=salient_scale))))

    factors = [f.clone().requires_grad_() for f in (binary.scale, binary.mean, binary.row, binary.col, salient.scale)]
    assert torch.autograd.gradcheck(dense, factors)


def test_stored_weight_folds_rows_and_rounds_factors():
    weight = random_quantized(4, 9, salient=3, seed=1, dtype=torch.float32)
    kept = as_stored(weight)
    binary = kept.groups[0]
    scale, mean = folded_rows(weight.groups[0])
    assert binary.row is None
    assert binary.scale.equal((weight.groups[0].scale * weight.groups[0].row).half().float())
    assert binary.mean.equal((weight.groups[0].mean * weight.groups[0].row).half().float())
    assert (binary.scale.equal(stored(scale)), binary.mean.equal(stored(mean))) == (True, True)
    assert binary.col.equal(weight.groups[0].col.half().float())
    assert kept.groups[1].zero.equal(weight.groups[1].zero)
    torch.testing.assert_close(reconstruct(kept), reconstruct(weight), rtol=3e-3, atol=3e-3)
    assert reconstruct(as_stored(kept)).equal(reconstruct(kept)), "storing twice changes nothing"


def test_stored_weight_carries_no_gradient():
    weight = random_quantized(2, 5, salient=2, seed=2)
    learned = replace(weight.groups[0], scale=weight.groups[0].scale.requires_grad_())
    assert not reconstruct(as_stored(QuantizedWeight((learned, weight.groups[1])))).requires_grad


# The whole weight


@pytest.mark.parametrize(("salient", "names"), [(0, ["1bit"]), (3, ["1bit", "4bit"]), (7, ["4bit"])])
def test_groups_partition_the_columns_and_none_is_empty(salient, names):
    mask = salient_columns(torch.arange(7.0), salient)
    weight = quantize_weight(random_weight(5, 7), mask, salient_range=SalientRange.ROW, row_mean=True)
    assert [group.width.name for group in weight.groups] == names
    assert (weight.rows, weight.cols) == (5, 7)
    assert torch.cat([group.columns for group in weight.groups]).sort().values.tolist() == list(range(7))
    if salient:
        assert weight.groups[-1].columns.tolist() == list(range(7 - salient, 7))


def test_binarized_columns_do_not_see_the_salient_ones():
    weight = random_weight(4, 6)
    mask = torch.tensor([True, False, False, False, False, True])
    loud = weight.clone()
    loud[:, mask] *= 1000
    settings = {"salient_range": SalientRange.ROW, "row_mean": True}
    quiet_group, loud_group = (quantize_weight(w, mask, **settings).groups[0] for w in (weight, loud))
    assert all(getattr(quiet_group, name).equal(getattr(loud_group, name)) for name in ("codes", "scale", "mean"))


def test_half_precision_weights_are_quantized_in_float32():
    weight = random_weight(4, 6).bfloat16()
    mask = salient_columns(torch.arange(6.0), 2)
    settings = {"salient_range": SalientRange.ROW, "row_mean": True}
    low, full = (reconstruct(quantize_weight(w, mask, **settings)) for w in (weight, weight.float()))
    assert low.dtype == torch.float32
    assert low.equal(full)


# One width for all columns: embedding and head


def test_symmetric_weight_by_hand():
    """Scales 1/127, 1 (nothing to scale) and 2; 127 / 2 lies between two levels, and the even digit (190) wins."""
    weight = torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0], [-254.0, 2.0, 127.0]])
    (group,) = symmetric_weight(weight, EIGHT_BIT).groups
    assert group.codes.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 1, 63]]
    assert group.scale.flatten().tolist() == [pytest.approx(1 / 127, rel=2**-11), 1.0, 2.0]
    assert group.columns.tolist() == [0, 1, 2] and group.zero is group.mean is group.col is None


@given(
    st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=12),
    st.sampled_from([1.0, 1e-3, 1e-6, 1e-9]),
    st.sampled_from([EIGHT_BIT, TERNARY]),
)
def test_symmetric_weight_moves_nothing_by_more_than_half_a_step(values, factor, width):
    weight = torch.tensor([values]) * factor
    rounded = symmetric_weight(weight, width)
    (group,) = rounded.groups
    assert group.scale.equal(group.scale.half().float())
    assert (reconstruct(rounded) - weight).abs().max() <= 0.5001 * group.scale
    largest = weight.abs().max()
    assert group.scale == 1 or (group.scale * -width.lowest - largest) <= 2**-10 * largest + 2**-24 * 127


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_a_row_that_cannot_be_scaled_has_no_finite_scale(bad):
    weight = torch.tensor([[1.0, 2.0], [bad, 1.0]])
    scale = symmetric_weight(weight, EIGHT_BIT).groups[0].scale
    assert scale.isfinite().flatten().tolist() == [True, False]


# The code widths


def levels_of(width):
    return [width.lowest + width.step * digit for digit in range(width.count)]


def test_levels_by_hand():
    assert {name: levels_of(width) for name, width in CODE_WIDTHS.items()} == {
        "1bit": [-1, 1],
        "ternary": [-1, 0, 1],
        "4bit": [-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15],
        "8bit": list(range(-127, 128)),
    }
    assert (ONE_BIT.name, TERNARY.name, FOUR_BIT.name, EIGHT_BIT.name) == tuple(CODE_WIDTHS)


BY_WIDTH = pytest.mark.parametrize("width", CODE_WIDTHS.values(), ids=lambda width: width.name)


@BY_WIDTH
def test_levels_need_no_zero_and_fit_int8(width):
    levels = levels_of(width)
    assert levels == [-level for level in reversed(levels)], "a group without a zero is symmetric"
    assert torch.tensor(levels, dtype=torch.int8).tolist() == levels


@pytest.mark.parametrize(
    ("width", "values", "expected"),
    [
        (ONE_BIT, [-0.3, 0.3, -1.0, 1.0], [-1, 1, -1, 1]),
        (ONE_BIT, [0.0, -0.0], [1, 1]),  # ties
        (TERNARY, [-0.51, -0.49, 0.0, 0.49, 0.51], [-1, 0, 0, 0, 1]),
        (TERNARY, [-0.5, 0.5], [-1, 1]),  # ties go to the even digit: 0 and 2
        (FOUR_BIT, [-0.1, 0.1, 1.9, 2.1, -13.9, 7.0], [-1, 1, 1, 3, -13, 7]),
        (FOUR_BIT, [-14.0, -12.0, 0.0, 2.0, 14.0], [-15, -11, 1, 1, 13]),  # ties: digits 0, 2, 8, 8, 14
    ],
)
def test_nearest_level_by_hand(width, values, expected):
    assert nearest_level(torch.tensor([values]), width).tolist() == [expected]


@BY_WIDTH
def test_nearest_level_clamps(width):
    highest = width.lowest + width.step * (width.count - 1)
    values = torch.tensor([[-torch.inf, -1e30, width.lowest - 0.75, highest + 0.75, 1e30, torch.inf]])
    assert nearest_level(values, width).tolist() == [[width.lowest] * 3 + [highest] * 3]


@BY_WIDTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nearest_level_keeps_dtype_shape_and_every_level(width, dtype):
    levels = torch.tensor(levels_of(width), dtype=dtype).expand(2, -1)
    result = nearest_level(levels, width)
    assert result.dtype == dtype
    assert result.equal(levels)


@BY_WIDTH
@given(
    values=st.lists(st.one_of(st.floats(-20, 20), st.integers(-80, 80).map(lambda n: n / 4)), min_size=1, max_size=20)
)
def test_nearest_level_is_the_argmin_over_the_levels(width, values):
    values = torch.tensor([values], dtype=torch.float64)
    original = values.clone()
    found = nearest_level(values, width)
    assert values.equal(original), "the argument is left alone"
    distances = (values[..., None] - torch.tensor(levels_of(width), dtype=torch.float64)).abs()
    assert set(found.flatten().tolist()) <= set(levels_of(width))
    # A value within rounding of a tie may go to either side.
    assert ((values - found).abs() <= distances.amin(-1) + 1e-12).all()
