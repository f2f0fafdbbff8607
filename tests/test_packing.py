"""Bytes: what is packed comes back, bit order by hand, damaged tensors are named, a new width is only a table row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import random_groups
from test_binarize import random_group, random_mixed, random_quantized, random_weight

from ptq161 import packing
from ptq161.binarize import (
    CODE_WIDTHS,
    FOUR_BIT,
    ONE_BIT,
    TERNARY,
    CodeWidth,
    QuantizedWeight,
    as_stored,
    quantize_weight,
    reconstruct,
    salient_columns,
)
from ptq161.config import SalientRange
from ptq161.errors import CheckpointError
from ptq161.packing import (
    GroupLayout,
    LinearLayout,
    checked,
    codes_per_byte,
    layout_of,
    pack,
    pack_codes,
    packed_length,
    problems,
    type_width,
    unpack,
    unpack_codes,
)

TWO_BIT = CodeWidth("2bit", count=4, lowest=-3, step=2)
SIX_LEVELS = CodeWidth("6level", count=6, lowest=-5, step=2)  # three codes a byte, not all bytes taken
WIDTHS = [*CODE_WIDTHS.values(), TWO_BIT, SIX_LEVELS, CodeWidth("3bit", count=8, lowest=0, step=1)]
BY_NAME = pytest.mark.parametrize("width", WIDTHS, ids=lambda width: width.name)


def packed_example(rows=5, cols=11, salient=3, seed=0):
    return pack(random_quantized(rows, cols, salient, seed, dtype=torch.float32))


def assert_same(one, other):
    assert one.layout == other.layout
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype, name
        assert tensor.equal(other.tensors[name]), name


@given(rows=st.integers(1, 17), cols=st.integers(1, 40), seed=st.integers(0, 10_000), data=st.data())
def test_pack_after_unpack_gives_the_same_bytes(rows, cols, seed, data):
    salient = data.draw(st.integers(0, cols))
    packed = packed_example(rows, cols, salient, seed)
    assert list(packed.tensors) == list(packed.layout.specs())
    assert_same(pack(unpack(packed)), packed)


@given(rows=st.integers(1, 9), cols=st.integers(1, 30), seed=st.integers(0, 10_000), data=st.data())
def test_unpacked_weight_is_exactly_the_stored_one(rows, cols, seed, data):
    weight = random_quantized(rows, cols, data.draw(st.integers(0, cols)), seed, dtype=torch.float32)
    assert reconstruct(unpack(pack(weight))).equal(reconstruct(as_stored(weight)))


def test_packing_a_fresh_weight_moves_its_salient_columns_not_at_all():
    mask = salient_columns(torch.rand(33, generator=torch.Generator().manual_seed(0)), 7)
    weight = quantize_weight(random_weight(9, 33), mask, salient_range=SalientRange.ROW, row_mean=True)
    before, after = reconstruct(weight), reconstruct(unpack(pack(weight)))
    assert before[:, mask].equal(after[:, mask])
    torch.testing.assert_close(before, after, rtol=2e-3, atol=1e-3)


@BY_NAME
@given(shape=st.lists(st.integers(1, 23), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_codes_of_any_width_and_size_come_back(width, shape, seed):
    digits = torch.randint(width.count, shape, generator=torch.Generator().manual_seed(seed))
    levels = (width.lowest + width.step * digits).to(torch.int8)
    packed = pack_codes(levels, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], packed_length(shape[-1], width))
    assert unpack_codes(packed, shape[-1], width).equal(levels)


@pytest.mark.parametrize(
    ("width", "levels", "expected"),
    [
        (ONE_BIT, [1, -1, -1, 1], [0b1001]),
        (ONE_BIT, [-1] * 8 + [1], [0, 1]),
        (FOUR_BIT, [-9, 5, -1], [3 + 16 * 10, 7]),  # digits 3, 10, 7
        (FOUR_BIT, [-15, 15], [0 + 16 * 15]),
        (TERNARY, [-1, 0, 1, 1, -1, 1], [0 + 3 * 1 + 9 * 2 + 27 * 2 + 81 * 0, 2]),
        (TWO_BIT, [-3, -1, 1, 3], [0 + 4 * 1 + 16 * 2 + 64 * 3]),
    ],
)
def test_bit_order_by_hand(width, levels, expected):
    assert pack_codes(torch.tensor(levels, dtype=torch.int8), width).tolist() == expected


def test_codes_per_byte():
    assert [codes_per_byte(count) for count in (2, 3, 4, 8, 16, 256)] == [8, 5, 4, 2, 2, 1]


def test_column_types_take_log2_of_the_groups():
    assert [type_width(groups).count for groups in (2, 3, 4, 5, 16)] == [2, 4, 4, 8, 16]


def test_stored_tensors_of_the_papers_layer_by_hand():
    """rows 10, cols 21, of which 5 salient: 16 signs are 2 bytes a row, 5 nibbles are 3."""
    specs = packed_example(rows=10, cols=21, salient=5).layout.specs()
    assert {name: (spec.shape, spec.dtype, spec.part, spec.nbytes) for name, spec in specs.items()} == {
        "weight": ((10, 2), torch.uint8, "codes_1bit", 20),
        "scale_0": ((10,), torch.float16, "scales", 20),
        "mean_0": ((10,), torch.float16, "scales", 20),
        "col_0": ((16,), torch.float16, "scales", 32),
        "weight_1": ((10, 3), torch.uint8, "codes_4bit", 30),
        "scale_1": ((10,), torch.float16, "scales", 20),
        "zero_1": ((5,), torch.uint8, "scales", 5),
        "column_types": ((3,), torch.uint8, "columns", 3),
    }


def mixed_layout(rows, binarized, ternary, salient):
    """Three groups with one row scale each and nothing else."""
    sizes = {"1bit": binarized, "ternary": ternary, "4bit": salient}
    groups = (GroupLayout(width, cols, zero=False, mean=False, col=False) for width, cols in sizes.items())
    return LinearLayout(rows, tuple(groups))


def test_stored_tensors_of_a_mixed_layer_by_hand():
    """rows 10, cols 24: 9 signs are 2 bytes a row, 12 ternary codes 3, 3 nibbles 2; 24 types of 2 bits are 6 bytes."""
    specs = mixed_layout(10, 9, 12, 3).specs()
    assert {name: (spec.shape, spec.dtype, spec.part, spec.nbytes) for name, spec in specs.items()} == {
        "weight": ((10, 2), torch.uint8, "codes_1bit", 20),
        "scale_0": ((10,), torch.float16, "scales", 20),
        "weight_1": ((10, 3), torch.uint8, "codes_ternary", 30),
        "scale_1": ((10,), torch.float16, "scales", 20),
        "weight_2": ((10, 2), torch.uint8, "codes_4bit", 20),
        "scale_2": ((10,), torch.float16, "scales", 20),
        "column_types": ((6,), torch.uint8, "columns", 6),
    }


@given(rows=st.integers(1, 9), sizes=st.tuples(*[st.integers(1, 12)] * 3), seed=st.integers(0, 1000))
def test_mixed_weights_come_back(rows, sizes, seed):
    weight = random_mixed(rows, sizes, seed)
    packed = pack(weight)
    assert packed.layout == mixed_layout(rows, *sizes)
    assert list(packed.tensors) == list(packed.layout.specs())
    assert_same(pack(unpack(packed)), packed)
    assert reconstruct(unpack(packed)).equal(reconstruct(as_stored(weight)))
    assert list(problems(packed.layout, packed.tensors)) == []


@given(rows=st.integers(1, 12), cols=st.integers(1, 30), data=st.data())
def test_layout_sizes_are_the_real_tensors(rows, cols, data):
    packed = packed_example(rows, cols, data.draw(st.integers(0, cols)))
    for name, spec in packed.layout.specs().items():
        tensor = packed.tensors[name]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
        assert tensor.numel() * tensor.element_size() == spec.nbytes


def test_layout_of_one_group_has_no_column_types():
    assert "column_types" not in packed_example(salient=0).tensors
    assert "column_types" not in packed_example(salient=11).tensors
    assert packed_example(salient=0).layout == LinearLayout(
        5, (GroupLayout("1bit", 11, zero=False, mean=True, col=True),)
    )


def test_new_widths_are_only_table_rows(monkeypatch):
    """Three groups, two of widths that the package does not have, and nothing else changed."""
    monkeypatch.setattr(packing, "CODE_WIDTHS", CODE_WIDTHS | {"6level": SIX_LEVELS, "2bit": TWO_BIT})
    generator = torch.Generator().manual_seed(0)
    parts = torch.randperm(29, generator=generator).split([4, 12, 13])
    weight = QuantizedWeight(
        (
            random_group(parts[0].sort().values, 7, FOUR_BIT, generator, zero=True, dtype=torch.float32),
            random_group(parts[1].sort().values, 7, SIX_LEVELS, generator, mean=True, row=True, dtype=torch.float32),
            random_group(parts[2].sort().values, 7, TWO_BIT, generator, zero=True, col=True, dtype=torch.float32),
        )
    )
    packed = pack(weight)
    specs = packed.layout.specs()
    assert specs["weight_1"].shape == (7, 4)
    assert specs["weight_2"].shape == (7, 4)
    assert specs["column_types"].shape == (8,)  # 29 channels of 2 bits
    assert_same(pack(unpack(packed)), packed)
    assert reconstruct(unpack(packed)).equal(reconstruct(as_stored(weight)))
    assert list(problems(packed.layout, packed.tensors)) == []
    packed.tensors["weight_1"][3, 1] = 216
    assert list(problems(packed.layout, packed.tensors)) == [("weight_1", "has a byte that is no 6level code")]


# Damage


def test_a_byte_that_is_no_ternary_code_is_found():
    packed = pack(random_mixed(7, (3, 12, 2), seed=0))
    packed.tensors["weight_1"][3, 1] = 242  # 22222 in base 3, the largest code
    assert list(problems(packed.layout, packed.tensors)) == []
    packed.tensors["weight_1"][3, 1] = 243
    assert list(problems(packed.layout, packed.tensors)) == [("weight_1", "has a byte that is no ternary code")]


def damaged(change):
    packed = packed_example()
    tensors = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    change(tensors)
    return packed.layout, tensors


DAMAGE = {
    "missing": (lambda t: t.pop("scale_0"), "scale_0", "missing"),
    "extra": (lambda t: t.update(bias_7=torch.ones(2)), "bias_7", "does not belong"),
    "shape": (lambda t: t.update(weight=t["weight"][:-1]), "weight", r"uint8\[4, 1\], expected torch\.uint8\[5, 1\]"),
    "dtype": (lambda t: t.update(scale_0=t["scale_0"].float()), "scale_0", "float32.*expected.*float16"),
    "nan": (lambda t: t["mean_0"].__setitem__(2, float("nan")), "mean_0", "NaN or infinite"),
    "infinity": (lambda t: t["col_0"].__setitem__(0, float("inf")), "col_0", "NaN or infinite"),
    "types": (lambda t: t["column_types"].fill_(0), "column_types", r"assigns \[11, 0\].*expected \[8, 3\]"),
}


def test_good_tensors_have_no_problems():
    packed = packed_example()
    assert list(problems(packed.layout, packed.tensors)) == []
    assert_same(checked(packed.layout, packed.tensors, "here"), packed)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(kind):
    change, name, what = DAMAGE[kind]
    layout, tensors = damaged(change)
    [(found, text)] = problems(layout, tensors)
    assert found == name
    with pytest.raises(CheckpointError, match=rf"tensor model\.layers\.0\.q\.{name} .*{what}.*damaged") as error:
        checked(layout, tensors, "model.layers.0.q")
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_layout_is_read_off_a_weight():
    weight = random_quantized(3, 8, 2, seed=0)
    assert layout_of(weight) == LinearLayout(
        3,
        (
            GroupLayout("1bit", 6, zero=False, mean=True, col=True),
            GroupLayout("4bit", 2, zero=True, mean=False, col=False),
        ),
    )


@pytest.mark.parametrize("name", ["weight", "weight_1", "zero_1", "column_types"])
def test_padding_must_be_zero(name):
    packed = pack(random_groups(3, {"1bit": 4, "4bit": 3}, paper=True))
    assert not list(problems(packed.layout, packed.tensors))
    packed.tensors[name].view(-1)[-1] |= 0x80
    assert list(problems(packed.layout, packed.tensors)) == [(name, "has padding that is not zero")]
