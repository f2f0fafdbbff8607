"""The bit budget: the chosen ratio is the largest within it, against brute force; the models of the paper."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ptq161.budget import LinearShape, model_layout, paper_layout, salient_ratio
from ptq161.config import QuantConfig
from ptq161.errors import InputError

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 25), st.booleans()), min_size=1, max_size=3)


def linears(shapes):
    """Distinct owners, each followed by a linear of its size that shares its column types where asked."""
    result = {}
    for index, (rows, cols, shared) in enumerate(shapes):
        result[f"{index}"] = LinearShape(rows, cols)
        if shared:
            result[f"{index}.shared"] = LinearShape(rows, cols, columns_from=f"{index}")
    return result


@settings(max_examples=30)
@given(shapes=SHAPES, bits=st.floats(1.5, 8), row_mean=st.booleans())
def test_no_larger_ratio_stays_within_the_budget(shapes, bits, row_mean):
    shapes = linears(shapes)
    config = QuantConfig(bits=bits, row_mean=row_mean)

    def bits_at(ratio):
        return model_layout(shapes, ratio, row_mean).bits_per_weight

    # Every ratio at which any linear gains a column, and points between them.
    grid = {count / shape.cols for shape in shapes.values() for count in range(shape.cols + 1)}
    grid |= {k / 23 for k in range(24)}
    within = [ratio for ratio in grid if bits_at(ratio) <= bits]
    if not within:
        with pytest.raises(InputError, match=f"lowest figure to {min(map(bits_at, grid)):.3f}"):
            salient_ratio(shapes, config)
        return
    chosen = salient_ratio(shapes, config)
    assert bits_at(chosen) <= bits
    for ratio in within:
        assert ratio <= chosen or model_layout(shapes, ratio, row_mean) == model_layout(shapes, chosen, row_mean)


@given(shapes=SHAPES, ratio=st.floats(0, 1))
def test_a_given_ratio_is_taken_as_it_is(shapes, ratio):
    assert salient_ratio(linears(shapes), QuantConfig(bits=None, salient_ratio=ratio)) == ratio


@given(shapes=SHAPES, ratio=st.floats(0, 1))
def test_budget_of_exactly_a_layouts_bits_reaches_that_layout(shapes, ratio):
    shapes = linears(shapes)
    bits = model_layout(shapes, ratio, True).bits_per_weight
    assume(1 < bits <= 8)
    chosen = model_layout(shapes, salient_ratio(shapes, QuantConfig(bits=bits, row_mean=True)), True)
    assert chosen.bits_per_weight <= bits
    assert chosen.parts()["codes_4bit"] >= model_layout(shapes, ratio, True).parts()["codes_4bit"]


def llama(layers, hidden, inner, kv):
    block = {
        "q": LinearShape(hidden, hidden),
        "k": LinearShape(kv, hidden, "q"),
        "v": LinearShape(kv, hidden, "q"),
        "o": LinearShape(hidden, hidden),
        "gate": LinearShape(inner, hidden),
        "up": LinearShape(inner, hidden, "gate"),
        "down": LinearShape(hidden, inner),
    }
    return {
        f"{index}.{name}": LinearShape(shape.rows, shape.cols, shape.columns_from and f"{index}.{shape.columns_from}")
        for index in range(layers)
        for name, shape in block.items()
    }


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        pytest.param(llama(32, 4096, 11008, 4096), 0.198, id="llama-7b", marks=pytest.mark.slow),
        pytest.param(llama(30, 576, 1536, 192), 0.17, id="smollm2-135m"),
    ],
)
def test_ratio_of_known_models(shapes, expected):
    ratio = salient_ratio(shapes, QuantConfig(bits=1.61, row_mean=True))
    assert ratio == pytest.approx(expected, abs=0.003)
    bits = model_layout(shapes, ratio, row_mean=True).bits_per_weight
    assert 1.6 < bits <= 1.61


def test_the_row_mean_costs_bits():
    shapes = llama(1, 576, 1536, 192)
    assert salient_ratio(shapes, QuantConfig(row_mean=False)) > salient_ratio(shapes, QuantConfig(row_mean=True))


def test_unreachable_budget_names_the_lowest_figure():
    """The 260,000-parameter model: its row vectors alone are too much for 1.61 bits."""
    shapes = llama(5, 64, 172, 32)
    with pytest.raises(InputError, match=r"bits=1\.61 cannot be reached.*lowest figure to 1\.\d\d\d") as error:
        salient_ratio(shapes, QuantConfig(bits=1.61, row_mean=True))
    assert "--salient-ratio" in str(error.value)
    lowest = model_layout(shapes, 0.0, row_mean=True).bits_per_weight
    assert f"{lowest:.3f}" in str(error.value)


@pytest.mark.parametrize(("salient", "widths"), [(0, ["1bit"]), (4, ["1bit", "4bit"]), (9, ["4bit"])])
def test_no_group_is_empty(salient, widths):
    layout = paper_layout(5, 9, salient, row_mean=True)
    assert [group.width for group in layout.groups] == widths
    assert layout.cols == 9
