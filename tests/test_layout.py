"""What config.json carries: sizes against real tensors, a JSON round trip, and hostile JSON refused."""

import copy
import dataclasses
import json

import pytest
from test_binarize import random_quantized

from ptq161.budget import paper_layout
from ptq161.errors import CheckpointError
from ptq161.layout import ModelLayout, PackedLinearSpec, paper_bits, vocabulary_spec
from ptq161.packing import FORMAT_VERSION, pack


def small_layout():
    return ModelLayout(
        {
            "layers.0.q": PackedLinearSpec(paper_layout(8, 12, 3, row_mean=True)),
            "layers.0.k": PackedLinearSpec(paper_layout(4, 12, 3, row_mean=True), columns_from="layers.0.q"),
            "layers.0.down": PackedLinearSpec(paper_layout(8, 20, 0, row_mean=False)),
        }
    )


def test_sizes_are_the_bytes_of_real_tensors():
    layout = small_layout()
    stored = 0
    for name, salient in (("layers.0.q", 3), ("layers.0.k", 3)):
        spec = layout.linears[name]
        tensors = pack(random_quantized(spec.layout.rows, spec.layout.cols, salient, seed=0)).tensors
        stored += sum(tensors[part].nbytes for part in spec.specs())
    stored += 8 * 3 + 8 * 2 + 20 * 2  # down: 20 signs in 3 bytes a row, row scale, column scale; no mean
    weights = 8 * 12 + 4 * 12 + 8 * 20
    assert layout.quantized_weights == weights
    assert sum(layout.parts().values()) == stored
    assert layout.bits_per_weight == 8 * stored / weights
    assert sum(spec.nbytes for spec in layout.tensor_specs().values()) == stored


def test_shared_column_types_are_stored_once():
    names = small_layout().tensor_specs()
    assert "layers.0.q.column_types" in names
    assert "layers.0.k.column_types" not in names
    assert "layers.0.down.column_types" not in names
    assert small_layout().parts()["columns"] == 2  # 12 channels of one bit


def test_json_round_trip():
    data = small_layout().to_dict()
    assert data["format_version"] == FORMAT_VERSION
    assert len(data["layouts"]) == 3
    again = ModelLayout.from_dict(json.loads(json.dumps(data)))
    assert again == small_layout()
    assert again.to_dict() == data


def test_equal_layouts_are_written_once():
    one = PackedLinearSpec(paper_layout(8, 12, 3, row_mean=True))
    data = ModelLayout({f"layers.{index}.q": one for index in range(30)}).to_dict()
    assert len(data["layouts"]) == 1


def at(*path):
    """A change to the JSON: follow the path, then set the last key."""
    *way, key, value = path

    def change(data):
        for step in way:
            data = data[step]
        data[key] = value

    return change


def without(*path):
    *way, key = path

    def change(data):
        for step in way:
            data = data[step]
        del data[key]

    return change


GROUP = ("layouts", 0, "groups", 0)
HOSTILE = {
    "no version": without("format_version"),
    "next version": at("format_version", FORMAT_VERSION + 1),
    "version as text": at("format_version", str(FORMAT_VERSION)),
    "no layouts": without("layouts"),
    "layouts null": at("layouts", None),
    "layouts text": at("layouts", "abc"),
    "no linears": without("linears"),
    "linears list": at("linears", [1]),
    "linears empty": at("linears", {}),
    "linear list": at("linears", "layers.0.q", []),
    "linear without layout": without("linears", "layers.0.q", "layout"),
    "linear without owner": without("linears", "layers.0.q", "columns_from"),
    "layout index too large": at("linears", "layers.0.q", "layout", 3),
    "layout index negative": at("linears", "layers.0.q", "layout", -1),
    "layout index text": at("linears", "layers.0.q", "layout", "0"),
    "layout index float": at("linears", "layers.0.q", "layout", 0.0),
    "owner number": at("linears", "layers.0.k", "columns_from", 1),
    "owner unknown": at("linears", "layers.0.k", "columns_from", "layers.9.q"),
    "owner itself": at("linears", "layers.0.k", "columns_from", "layers.0.k"),
    "owner without types of its own": at("linears", "layers.0.q", "columns_from", "layers.0.k"),
    "owner of another size": at("linears", "layers.0.k", "columns_from", "layers.0.down"),
    "no groups": without("layouts", 0, "groups"),
    "groups empty": at("layouts", 0, "groups", []),
    "groups too many": at("layouts", 0, "groups", [small_layout().to_dict()["layouts"][0]["groups"][0]] * 17),
    "rows zero": at("layouts", 0, "rows", 0),
    "rows negative": at("layouts", 0, "rows", -8),
    "rows huge": at("layouts", 0, "rows", 2**40),
    "rows text": at("layouts", 0, "rows", "8"),
    "rows float": at("layouts", 0, "rows", 8.0),
    "rows true": at("layouts", 0, "rows", True),
    "rows null": at("layouts", 0, "rows", None),
    "cols zero": at(*GROUP, "cols", 0),
    "cols huge": at(*GROUP, "cols", 2**63),
    "cols missing": without(*GROUP, "cols"),
    "width unknown": at(*GROUP, "width", "5bit"),
    "width list": at(*GROUP, "width", ["1bit"]),
    "width null": at(*GROUP, "width", None),
    "mean text": at(*GROUP, "mean", "false"),
    "zero number": at(*GROUP, "zero", 1),
    "col missing": without(*GROUP, "col"),
}


def with_vocabulary():
    return dataclasses.replace(
        small_layout(), vocabulary={"embed": vocabulary_spec(100, 8), "head": vocabulary_spec(90, 8)}
    )


def test_vocabulary_survives_json_and_counts_in_no_bits():
    plain, layout = small_layout(), with_vocabulary()
    assert ModelLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    assert (layout.parts(), layout.bits_per_weight, layout.quantized_weights, layout.paper_bits) == (
        plain.parts(),
        plain.bits_per_weight,
        plain.quantized_weights,
        plain.paper_bits,
    )
    assert plain.vocabulary_bits is None and layout.vocabulary_bits == 8 + 16 / 8
    assert "vocabulary" not in plain.to_dict()
    added = layout.tensor_specs().keys() - plain.tensor_specs().keys()
    assert added == {"embed.weight", "embed.scale_0", "head.weight", "head.scale_0"}
    assert layout.tensor_specs()["embed.weight"].shape == (100, 8)


VOCABULARY_GROUP = ("layouts", -1, "groups", 0)
HOSTILE_VOCABULARY = {
    "list": at("vocabulary", []),
    "null": at("vocabulary", None),
    "index too large": at("vocabulary", "embed", "layout", 99),
    "of a linear's layout": at("vocabulary", "embed", "layout", 0),
    "a linear's name": lambda data: data["vocabulary"].update({"layers.0.q": data["vocabulary"]["embed"]}),
    "shared columns": at("vocabulary", "embed", "columns_from", "head"),
    "another width": at(*VOCABULARY_GROUP, "width", "4bit"),
    "with a zero": at(*VOCABULARY_GROUP, "zero", True),
    "rows huge": at("layouts", -1, "rows", 2**40),
    "cols huge": at(*VOCABULARY_GROUP, "cols", 2**63),
}


@pytest.mark.parametrize("kind", HOSTILE_VOCABULARY)
def test_hostile_vocabulary_is_refused(kind):
    data = copy.deepcopy(json.loads(json.dumps(with_vocabulary().to_dict())))
    HOSTILE_VOCABULARY[kind](data)
    with pytest.raises(CheckpointError, match="malformed") as error:
        ModelLayout.from_dict(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_json_is_refused(kind):
    data = copy.deepcopy(json.loads(json.dumps(small_layout().to_dict())))
    HOSTILE[kind](data)
    with pytest.raises(CheckpointError) as error:
        ModelLayout.from_dict(data)
    assert "\n" not in str(error.value)
    assert "version" in str(error.value) or "malformed" in str(error.value) or "column types" in str(error.value)


def test_version_error_says_both_versions():
    data = small_layout().to_dict() | {"format_version": 7}
    with pytest.raises(CheckpointError, match=f"version is 7, this ptq161 reads version {FORMAT_VERSION}"):
        ModelLayout.from_dict(data)


# The paper's own count


def test_paper_bits_by_hand():
    """Appendix A at 4096 x 4096 with 20 % salient: 1.6 + 4096 / 26843545.6 + 209715.2 / 26843545.6."""
    assert paper_bits(4096, 4096, 0.2) == pytest.approx(1.6 + 0.000152587890625 + 0.0078125, abs=1e-12)
    assert round(paper_bits(4096, 4096, 0.2), 2) == 1.61


def test_paper_bits_of_a_model_average_over_its_weights():
    linears = {
        "wide": PackedLinearSpec(paper_layout(64, 100, 20, row_mean=True)),
        "all": PackedLinearSpec(paper_layout(64, 50, 50, row_mean=True)),
        "none": PackedLinearSpec(paper_layout(64, 50, 0, row_mean=True)),
    }
    expected = (
        6400 * paper_bits(64, 100, 0.2) + 3200 * paper_bits(64, 50, 1.0) + 3200 * paper_bits(64, 50, 0.0)
    ) / 12800
    assert ModelLayout(linears).paper_bits == pytest.approx(expected)


def test_honest_bits_count_more_than_the_paper():
    """4096 x 4096, 819 salient, every byte by hand: 1.618 bits a weight where the formula says 1.608."""
    layout = ModelLayout({"q": PackedLinearSpec(paper_layout(4096, 4096, 819, row_mean=True))})
    codes = 4096 * (410 + 410)  # a row: 3277 signs in 410 bytes, 819 nibbles in 410
    vectors = 3 * 4096 * 2 + 3277 * 2 + 4096 // 2  # two row scales and the row mean, the column scale, zero levels
    assert sum(layout.parts().values()) == codes + vectors + 4096 // 8
    assert layout.bits_per_weight == 8 * (codes + vectors + 4096 // 8) / 4096**2
    assert layout.bits_per_weight > layout.paper_bits + 0.009
