"""docs/format.md, recomputed: its example, tables, sizes, fields and checksum."""

import json
import re
from pathlib import Path

import pytest
import torch
from packed import write_packed
from test_packing import mixed_layout

from ptq161.binarize import CODE_WIDTHS, CodeWidth, ColumnGroup, QuantizedWeight, reconstruct
from ptq161.budget import paper_layout
from ptq161.folder import tensor_checksum
from ptq161.layout import ModelLayout, PackedLinearSpec, vocabulary_spec
from ptq161.packing import FORMAT_VERSION, LinearLayout, codes_per_byte, pack, pack_codes, unpack

PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")


def block(name):
    """The JSON block of that name."""
    (content,) = re.findall(rf"```json {name}\n(.*?)```", PAGE, re.DOTALL)
    return json.loads(content)


def table(heading):
    """Rows of the table whose header line starts with `heading`, cells without backticks."""
    _, _, rest = PAGE.partition(f"| {heading} |")
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def example():
    """The quantized weight of the worked example."""
    page = block("levels")

    def row(values):
        return None if values is None else torch.tensor(values)[:, None].float()

    groups = [
        ColumnGroup(
            columns=torch.tensor(page["columns"][g]),
            width=list(CODE_WIDTHS.values())[g],
            codes=torch.tensor(page["levels"][g], dtype=torch.int8),
            scale=row(page["scale"][g]),
            mean=row(page["mean"][g]),
            zero=row(page["zero"][g]),
            col=None if page["col"][g] is None else torch.tensor(page["col"][g])[None],
        )
        for g in (0, 1, 2)
    ]
    return QuantizedWeight(tuple(groups))


def test_version():
    assert PAGE.startswith(f"# The packed checkpoint, format version {FORMAT_VERSION}\n")
    assert f"| `format_version` | {FORMAT_VERSION};" in PAGE


def test_example_packs_to_the_tensors_on_the_page(example):
    packed, page = pack(example), block("tensors")
    assert list(packed.tensors) == list(page)
    assert {name: tensor.tolist() for name, tensor in packed.tensors.items()} == page
    assert len(page) == 10


def test_example_reads_back_as_the_weight_on_the_page(example):
    assert reconstruct(unpack(pack(example))).tolist() == block("weight") == reconstruct(example).tolist()


def test_arithmetic_in_the_text():
    equations = re.findall(r"[\d.( ]*\(?-?[\d.]+(?: ?[-+x*)( ] ?\(?-?[\d.]+\)?)* = -?[\d.]*\d", PAGE)
    checked = 0
    for equation in equations:
        left, _, right = equation.strip().partition(" = ")
        if re.search(r"[-+x]", left):
            assert eval(left.replace("x", "*")) == float(right), equation
            checked += 1
    assert checked >= 12


def test_tensor_table_names_every_kind_of_tensor_with_its_dtype(example):
    rows = table("tensor | dtype")
    kinds = {re.sub(r"^<linear>\.(\w+?)_?(<g>)?$", r"\1", row[0].split("`")[0]): row[1] for row in rows}
    specs = pack(example).layout.specs()
    named = {re.sub(r"_\d+$", "", name): str(spec.dtype).removeprefix("torch.") for name, spec in specs.items()}
    assert kinds == named | {"bias": "any"}


def test_width_table_is_the_code_table():
    rows = [[name, *map(int, numbers)] for name, *numbers in table("width | levels")]
    assert rows == [[w.name, w.count, w.lowest, w.step, codes_per_byte(w.count)] for w in CODE_WIDTHS.values()]


def packed_bytes(levels, width):
    """The bytes of levels written as on the page."""
    return pack_codes(torch.tensor([int(level) for level in levels.split(",")]), width).tolist()


def test_ternary_levels_pack_as_the_page_says():
    levels, expected = re.search(r"ternary levels ([-\d, ]+) are .*?a byte: [^.]*? = (\d+)", PAGE, re.DOTALL).groups()
    assert packed_bytes(levels, CODE_WIDTHS["ternary"]) == [int(expected)]


def test_hypothetical_width_packs_as_the_page_says():
    [(code, per_byte, levels, expected)] = re.findall(
        r"`(CodeWidth\([^`]*\))`, (\w+)\s+codes\s+a byte: levels ([-\d, ]+) become the bytes ([\d, ]+\d)", PAGE
    )
    width = eval(code, {"CodeWidth": CodeWidth})
    assert {"four": 4, "five": 5}[per_byte] == codes_per_byte(width.count)
    assert packed_bytes(levels, width) == [int(byte) for byte in expected.split(",")]


def model_of(layout: LinearLayout):
    return ModelLayout({"linear": PackedLinearSpec(layout)})


def test_sizes_of_the_big_linear():
    rows, cols, salient = map(int, re.search(r"A (\d+) x (\d+) linear with (\d+) salient", PAGE).groups())
    groups = re.search(r"three groups have (\d+), (\d+) and (\d+) channels", PAGE).groups()
    paper = model_of(paper_layout(rows, cols, salient, row_mean=True))
    mixed = model_of(mixed_layout(rows, *map(int, groups)))
    assert mixed.quantized_weights == paper.quantized_weights == rows * cols
    assert {part: [int(first), int(second)] for part, first, second in table("part | paper, bytes | mixed, bytes")} == {
        part: [size, mixed.parts()[part]] for part, size in paper.parts().items()
    }
    assert f"That is {paper.bits_per_weight:.4f} and {mixed.bits_per_weight:.4f} bits per weight" in PAGE
    assert f"{paper.paper_bits:.4f} for the first linear" in PAGE and mixed.paper_bits is None


def size_by_the_page(sentence, **values):
    """The formula in the block after a sentence, computed."""
    formula = PAGE.partition(f"{sentence}\n\n")[2].partition("\n\n")[0]
    terms = " ".join(re.sub(r"\s{4,}[a-z].*$", "", line.strip()) for line in formula.splitlines())
    return eval(terms, {"ceil": lambda x: -int(-x // 1)} | values)


@pytest.mark.parametrize("rows", [2, 7, 4096])
@pytest.mark.parametrize(("binarized", "salient"), [(3, 2), (8, 1), (3285, 811)])
def test_size_formula_of_the_papers_layer(rows, binarized, salient):
    size = size_by_the_page("with `b` binarized and `s` salient channels takes", rows=rows, b=binarized, s=salient)
    specs = paper_layout(rows, binarized + salient, salient, row_mean=True).specs()
    assert size == sum(spec.nbytes for spec in specs.values())


@pytest.mark.parametrize("rows", [2, 7, 4096])
@pytest.mark.parametrize(("binarized", "ternary", "salient"), [(3, 2, 2), (8, 5, 1), (9, 6, 3), (1272, 2620, 204)])
def test_size_formula_of_the_mixed_layer(rows, binarized, ternary, salient):
    size = size_by_the_page(
        "`b` binarized, `t` ternary and `s` 4-bit channels takes", rows=rows, b=binarized, t=ternary, s=salient
    )
    assert size == sum(spec.nbytes for spec in mixed_layout(rows, binarized, ternary, salient).specs().values())


def test_sizes_of_the_embedding():
    line = re.search(r"A (\d+) x (\d+) embedding takes .* = (\d+) bytes, [^=]* = ([\d.]+) bits a weight", PAGE).groups()
    layout = ModelLayout({}, {"embedding": vocabulary_spec(int(line[0]), int(line[1]))})
    assert sum(spec.nbytes for spec in layout.tensor_specs().values()) == int(line[2])
    assert f"{layout.vocabulary_bits:.2f}" == line[3]


def test_config_fields(tmp_path):
    write_packed(tmp_path, int8_head=True)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert [row[0] for row in table("field | meaning")] == sorted(
        quantization, key=[r[0] for r in table("field | meaning")].index
    )
    listed = next(row[1] for row in table("field | meaning") if row[0] == "layouts")
    assert set(re.findall(r"`(\w+)`", listed + "`")) >= quantization["layouts"][0]["groups"][0].keys() | {"rows"}
    files = {path.name for path in tmp_path.iterdir()}
    for name in files:
        assert f"`{name}`" in PAGE


def test_checksum_of_the_example():
    line, checksum = re.search(r"the line is `([^`]+)` and the sum is `([0-9a-f]{64})`", PAGE).groups()
    weight = torch.tensor(block("tensors")["weight"], dtype=torch.uint8)
    assert tensor_checksum(weight) == checksum
    assert line == f"uint8{list(weight.shape)}"
