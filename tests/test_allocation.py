"""The split of every shared input under one budget: exact bytes, never above the budget, harm where it hurts least."""

import itertools
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq161 import allocation
from ptq161.allocation import (
    MIXED_WIDTHS,
    MOST_STEPS,
    NORMAL_ERROR,
    TERNARY_SHARE,
    SharedInput,
    allocate,
    mixed_layout,
    paper_allocation,
    ratio_split,
    shared_inputs,
)
from ptq161.budget import LinearShape, model_layout, salient_ratio
from ptq161.config import QuantConfig
from ptq161.errors import InputError
from ptq161.layout import ModelLayout, PackedLinearSpec

CONFIG = QuantConfig(method="mixed", bits=1.9)

# Two blocks of a tiny transformer: q, k and v share an input, and so do gate and up.
BLOCK = {
    "q": LinearShape(48, 96),
    "k": LinearShape(16, 96, "q"),
    "v": LinearShape(16, 96, "q"),
    "o": LinearShape(96, 48),
    "gate": LinearShape(128, 96),
    "up": LinearShape(128, 96, "gate"),
    "down": LinearShape(96, 128),
}
SHAPES = {
    f"{index}.{name}": replace(shape, columns_from=shape.columns_from and f"{index}.{shape.columns_from}")
    for index in (0, 1)
    for name, shape in BLOCK.items()
}
WEIGHTS = sum(shape.rows * shape.cols for shape in SHAPES.values())


def random_harms(shapes=SHAPES, seed=0, spread=1.0):
    """First linear of each shared input -> harms: lognormal over channels, and over inputs."""
    generator = torch.Generator().manual_seed(seed)
    harms = {}
    for shared in shared_inputs(shapes):
        importance = torch.randn(shared.cols, generator=generator).exp()
        size = (spread * torch.randn(1, generator=generator)).exp()
        harms[shared.names[0]] = sum(shared.rows) * size * importance[:, None] * torch.tensor(NORMAL_ERROR)
    return harms


def stored(layout):
    return sum(layout.parts().values())


def sizes_of(layout, name):
    """Channels of a linear at 1 bit, ternary and 4 bits."""
    counts = {group.width: group.cols for group in layout.linears[name].layout.groups}
    return tuple(counts.get(width.name, 0) for width in MIXED_WIDTHS)


def harm_of(layout, harms, shapes=SHAPES):
    """Expected harm of a layout, worked out channel by channel: most harmful channels widest."""
    total = 0.0
    for shared in shared_inputs(shapes):
        harm = harms[shared.names[0]].double()
        one, ternary, four = sizes_of(layout, shared.names[0])
        order = harm[:, 0].argsort(descending=True, stable=True)
        total += harm[order[:four], 2].sum() + harm[order[four : four + ternary], 1].sum()
        total += harm[order[four + ternary :], 0].sum()
        assert one == shared.cols - ternary - four
    return float(total)


def layout_of_splits(inputs, splits):
    """A model layout with these sizes, put together as the file's readers see it."""
    linears = {}
    for shared, sizes in zip(inputs, splits, strict=True):
        for name, rows in zip(shared.names, shared.rows, strict=True):
            layout = mixed_layout(rows, sizes)
            owned = name == shared.names[0] or len(layout.groups) == 1
            linears[name] = PackedLinearSpec(layout, None if owned else shared.names[0])
    return ModelLayout(linears)


# Shapes and prices


def test_linears_by_the_input_they_share():
    first, second = (shared_inputs(SHAPES)[start : start + 4] for start in (0, 4))
    assert [shared.names for shared in first] == [("0.q", "0.k", "0.v"), ("0.o",), ("0.gate", "0.up"), ("0.down",)]
    assert [shared.names[0] for shared in second] == ["1.q", "1.o", "1.gate", "1.down"]
    assert (first[0].rows, first[0].cols) == ((48, 16, 16), 96)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.tuples(*[st.integers(0, 50)] * 3))
def test_price_of_a_split_is_what_the_layout_stores(rows, sizes):
    if sum(sizes) == 0:
        sizes = (1, 0, 0)
    shared = SharedInput(tuple(f"linear{i}" for i in range(len(rows))), tuple(rows), sum(sizes))
    price = allocation._stored_bytes(shared, torch.tensor([sizes]))
    assert price.item() == stored(layout_of_splits([shared], [sizes]))


@pytest.mark.parametrize("cols", [5, 48, 96, 600])
def test_every_split_on_the_hull_has_its_exact_price_and_harm(cols):
    shared = SharedInput(("a", "b"), (24, 8), cols)
    harm = random_harms({"a": LinearShape(24, cols), "b": LinearShape(8, cols, "a")})["a"]
    hull = allocation._hull(shared, harm)
    shapes = {"a": LinearShape(24, cols), "b": LinearShape(8, cols, "a")}
    for split in hull:
        layout = layout_of_splits([shared], [split.sizes])
        assert split.nbytes == stored(layout)
        assert split.harm == pytest.approx(harm_of(layout, {"a": harm}, shapes), rel=1e-9)
    slopes = [(after.harm - before.harm) / (after.nbytes - before.nbytes) for before, after in itertools.pairwise(hull)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(slopes), "not convex: a dear step would come before a cheap one"


def test_no_split_at_all_lies_below_the_hull():
    """Every split of nine channels, whole bytes or not, against the hull made of those that are tried."""
    cols, rows = 9, 10
    shared = SharedInput(("a",), (rows,), cols)
    shapes = {"a": LinearShape(rows, cols)}
    harm = random_harms(shapes)["a"]
    hull = allocation._hull(shared, harm)
    for four in range(cols + 1):
        for ternary in range(cols + 1 - four):
            layout = layout_of_splits([shared], [(cols - four - ternary, ternary, four)])
            price, value = stored(layout), harm_of(layout, {"a": harm}, shapes)
            below = [split for split in hull if split.nbytes <= price]
            assert below, "cheaper than the cheapest split on the hull"
            if below[-1] is hull[-1]:
                assert value >= hull[-1].harm * (1 - 1e-9)
            else:
                left, right = below[-1], hull[len(below)]
                share = (price - left.nbytes) / (right.nbytes - left.nbytes)
                limit = left.harm + share * (right.harm - left.harm)
                assert value >= 0.97 * limit  # splits within a byte of a tried one may be a little better
                whole = four % 2 == 0 and ternary % 5 == 0
                assert not whole or value >= limit * (1 - 1e-9)


# The budget


@settings(max_examples=20)
@given(st.floats(1.75, 4.5), st.integers(0, 1000), st.sampled_from([0.0, 1.0, 3.0]))
def test_budget_holds_and_no_further_step_would(bits, seed, spread):
    harms = random_harms(seed=seed, spread=spread)
    layout = allocate(SHAPES, replace(CONFIG, bits=bits), harms)
    assert list(layout.linears) == list(SHAPES)
    assert layout.bits_per_weight <= bits
    budget = bits * WEIGHTS / 8
    for shared in shared_inputs(SHAPES):
        hull = allocation._hull(shared, harms[shared.names[0]])
        at = [split.sizes for split in hull].index(sizes_of(layout, shared.names[0]))
        if at + 1 < len(hull):
            assert stored(layout) + hull[at + 1].nbytes - hull[at].nbytes > budget


@settings(max_examples=15)
@given(st.integers(0, 1000), st.lists(st.floats(1.75, 4.5), min_size=2, max_size=4))
def test_more_budget_never_gives_more_harm(seed, budgets):
    harms = random_harms(seed=seed)
    found = [harm_of(allocate(SHAPES, replace(CONFIG, bits=bits), harms), harms) for bits in sorted(budgets)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(found))


def test_split_beats_the_same_shares_everywhere():
    harms = random_harms(spread=2.0)
    led = allocate(SHAPES, replace(CONFIG, bits=2.2), harms)
    uniform = max(
        (
            layout
            for ratio in (index / 96 for index in range(97))
            if (layout := allocate(SHAPES, replace(CONFIG, bits=None, salient_ratio=ratio))).bits_per_weight <= 2.2
        ),
        key=lambda layout: layout.bits_per_weight,
    )
    assert uniform.bits_per_weight > 2.1
    assert harm_of(led, harms) < 0.8 * harm_of(uniform, harms)


def test_inputs_that_matter_more_get_more_bits():
    harms = random_harms(spread=0.0)
    harms["1.q"] = 20 * harms["0.q"]
    harms["1.o"] = harms["0.o"] / 20
    layout = allocate(SHAPES, CONFIG, harms)

    def bits(name):
        one, ternary, four = sizes_of(layout, name)
        return one + 1.6 * ternary + 4 * four

    assert bits("1.q") > bits("0.q")
    assert bits("1.o") < bits("0.o")


def test_inputs_that_matter_alike_are_split_alike():
    """Twice the same block gives twice the same split, but for the last step, for which the budget may last once."""
    layout = allocate(SHAPES, CONFIG)
    different = {
        name for name in ("q", "o", "gate", "down") if sizes_of(layout, f"0.{name}") != sizes_of(layout, f"1.{name}")
    }
    assert len(different) <= 1


def test_linears_with_one_input_share_groups_and_store_their_types_once():
    layout = allocate(SHAPES, replace(CONFIG, bits=2.2), random_harms(spread=0.0))
    for name, shape in SHAPES.items():
        spec = layout.linears[name]
        assert spec.layout.cols == shape.cols and spec.layout.rows == shape.rows
        assert all(not (group.zero or group.mean or group.col) for group in spec.layout.groups)
        assert spec.columns_from == shape.columns_from
        if shape.columns_from is not None:
            assert sizes_of(layout, name) == sizes_of(layout, shape.columns_from)
            assert "column_types" not in spec.specs()
    assert ModelLayout.from_dict(layout.to_dict()) == layout


def test_budget_below_the_floor_names_the_lowest_figure():
    with pytest.raises(InputError) as error:
        allocate(SHAPES, replace(CONFIG, bits=1.1))
    floor = (
        8 * stored(layout_of_splits(shared_inputs(SHAPES), [(s.cols, 0, 0) for s in shared_inputs(SHAPES)])) / WEIGHTS
    )
    assert str(error.value) == (
        "bits=1.1 cannot be reached on this model: its row vectors alone bring the lowest figure to "
        f"{floor:.3f} bits per weight; ask for more bits, or give --salient-ratio"
    )
    named = float(f"{floor + 5e-4:.3f}")
    assert allocate(SHAPES, replace(CONFIG, bits=named)).bits_per_weight <= named


def test_all_four_bits_where_the_budget_is_large_enough():
    layout = allocate(SHAPES, replace(CONFIG, bits=8.0), random_harms())
    assert all(sizes_of(layout, name) == (0, 0, shape.cols) for name, shape in SHAPES.items())
    assert all(spec.columns_from is None for spec in layout.linears.values()), "no types to share"


# A ratio instead of a budget


@given(st.integers(1, 5000), st.floats(0, 1))
def test_ratio_split_is_exact(cols, ratio):
    one, ternary, four = ratio_split(cols, ratio)
    assert (one + ternary + four, min(one, ternary, four) >= 0) == (cols, True)
    assert four == min(cols, int(ratio * cols + 1e-6))
    assert abs(ternary - TERNARY_SHARE * (one + ternary)) <= 0.5


def test_ratio_needs_no_harms_and_is_the_same_everywhere():
    layout = allocate(SHAPES, replace(CONFIG, bits=None, salient_ratio=0.25), random_harms())
    assert sizes_of(layout, "0.q") == sizes_of(layout, "1.up") == (24, 48, 24)
    assert sizes_of(layout, "0.o") == (12, 24, 12)


def test_papers_split_takes_no_notice_of_harms():
    config = QuantConfig(bits=2.4)
    found = paper_allocation(SHAPES, config, random_harms())
    assert found == paper_allocation(SHAPES, config, None)
    assert found == model_layout(SHAPES, salient_ratio(SHAPES, config), config.row_mean)


# Size


def test_wide_linears_are_searched_in_coarser_steps():
    began = time.process_time()
    shapes = {"down": LinearShape(4096, 11008)}
    layout = allocate(shapes, replace(CONFIG, bits=1.61), random_harms(shapes))
    assert time.process_time() - began < 2
    assert 1.60 < layout.bits_per_weight <= 1.61
    for width in MIXED_WIDTHS[1:]:
        counts = allocation._counts(11008, width)
        assert len(counts) <= MOST_STEPS + 2 and counts[-1] == 11008 and counts[0] == 0
