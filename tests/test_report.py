"""The page and its figures: bytes and numbers arrive, foreign text stays text, nothing is loaded from outside."""

import copy
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ptq161.allocation import MIXED_WIDTHS
from ptq161.config import PRESETS, Magnitude
from ptq161.methods import METHODS
from ptq161.report import page
from ptq161.report.explanations import EXPLANATIONS, objective_in_words
from ptq161.report.figures import (
    bits_figure,
    channels_figure,
    corner_figure,
    learning_figure,
    loss_figure,
    storage_figure,
)
from ptq161.report.model_page import model_page
from ptq161.report.palette import COLOURS, MINUS, WHOLE, WIDTHS, colour
from ptq161.report.results import Channels, Corner, Evaluation, ModelResults, Sample

WIDTHS_IN_INCHES = (page.WIDE_INCHES, page.NARROW_INCHES)
PARTS = {"codes_1bit": 1000, "codes_4bit": 800, "columns": 0, "scales": 200}
MIXED_PARTS = {"codes_1bit": 500, "codes_ternary": 900, "codes_4bit": 300, "columns": 100, "scales": 200}
TUNED = {
    "steps": 8,
    "tokens": 65_536,
    "distinct_tokens": 65_536,
    "written_tokens": 0,
    "fresh": True,
    "held_out_first": 1.5,
    "held_out_last": 1.25,
    "curve": [{"tokens": 32_768, "divergence": 1.4}, {"tokens": 65_536, "divergence": 1.3}],
    "kept": True,
    "seconds": 2.0,
}
WEIGHTS = 10_000


def evaluation(name: str, ppl: float, bits: float | None) -> Evaluation:
    entry = {"ppl": ppl, "tokens": 5110, "windows": 10, "seqlen": 512, "bos": False}
    return Evaluation(name, 5000, {"bits_per_weight": bits, "perplexity": {"held-out.txt": entry}})


@pytest.fixture
def results() -> ModelResults:
    """A model in the paper's format."""
    inspect: dict[str, Any] = {
        "bits_per_weight": 1.6,
        "paper_bits": 1.55,
        "quantized_weights": WEIGHTS,
        "quantized_linears": 14,
        "dense_linears": 0,
        "linears_fp16_bytes": 20_000,
        "times_smaller": 10.0,
        "parts": PARTS,
        "other_bytes": 2900,
        "header_bytes": 100,
        "file_bytes": 5000,
        "layers": [
            {"rows": 50, "cols": 100, "linears": 1, "columns": {"1bit": 75, "4bit": 25}},
            {"rows": 10, "cols": 100, "linears": 5, "columns": {"1bit": 85, "4bit": 15}},
        ],
    }
    blocks = [{"index": i, "loss_first": 2.0, "loss_last": 1.0, "seconds": 1.0} for i in range(3)]
    return ModelResults(
        name="Tiny",
        source_label="source file",
        source_bytes=7000,
        quantize={"blocks": blocks, "seconds": 90.0, "peak_rss_bytes": 1_500_000_000, "distillation": None},
        run={"config": asdict(PRESETS["paper"].quant)},
        inspect=inspect,
        evaluations=[evaluation("original", 20.0, None), evaluation("packed", 50.0, 1.6)],
        channels=[Channels(0, "q_proj", "mean |x|", [1.0, 9.0, 0.0, 2.0], ["1bit", "4bit", "1bit", "1bit"])],
        corner=Corner("layers.0.q_proj", 7, [[1, 13, -1, 1]], ["1bit", "4bit", "1bit", "1bit"]),
        samples=[Sample("Once", " upon a time", " the the")],
        commands=["ptq161 inspect tiny"],
        caveats=["It does not talk sense."],
    )


@pytest.fixture
def mixed_results(results: ModelResults) -> ModelResults:
    """A model in the mixed format, tuned as a whole."""
    columns = {"1bit": 30, "ternary": 65, "4bit": 5}
    widths = ["1bit", "4bit", "ternary", "ternary"]
    return replace(
        results,
        quantize={**results.quantize, "distillation": TUNED},
        run={"config": asdict(PRESETS["best"].quant)},
        inspect={
            **results.inspect,
            "paper_bits": None,
            "parts": MIXED_PARTS,
            "layers": [{"rows": 100, "cols": 100, "linears": 1, "columns": columns}],
        },
        channels=[Channels(0, "q_proj", "mean x² × sum of w²", [1.0, 9.0, 3.0, 2.0], widths)],
        corner=Corner("layers.0.q_proj", 7, [[1, -15, 0, -1]], widths),
    )


class Outline(HTMLParser):
    """Checks nesting and collects what a browser would fetch, every id and the visible text."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def bars(figure: Figure, row: float) -> list[tuple[float, str]]:
    """(length, colour) of the bars at one height."""
    rectangles = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    at_row = [r for r in rectangles if math.isclose(r.get_y() + r.get_height() / 2, row)]
    return [(r.get_width(), to_hex(r.get_facecolor())) for r in at_row]


def text_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("width", WIDTHS_IN_INCHES)
def test_storage_bars_are_as_long_as_the_bytes(width: float) -> None:
    files = {"source": {WHOLE: 7_000_000}, "packed": {"codes_1bit": 1_000_000, "codes_4bit": 500_000, "other": 250_000}}
    figure = storage_figure(files, width)
    assert [length for length, _ in bars(figure, 0)] == [7.0]
    assert bars(figure, 1) == [(1.0, colour("sign")), (0.5, colour("salient")), (0.25, colour("other"))]
    assert text_of(figure) == ["7.0 MB", "1.8 MB"]


def test_bits_bar_adds_up_to_the_bits_per_weight() -> None:
    figure = bits_figure(PARTS, WEIGHTS, page.WIDE_INCHES)
    assert [length for length, _ in bars(figure, 0)] == pytest.approx([0.8, 0.64, 0.0, 0.16])
    assert text_of(figure)[-1] == "1.600"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["signs, 1 bit each", "4-bit codes", "scale factors"]  # not the channels' widths of no bytes


def test_ternary_codes_have_a_part_of_their_own() -> None:
    figure = bits_figure(MIXED_PARTS, WEIGHTS, page.WIDE_INCHES)
    assert bars(figure, 0)[1] == (pytest.approx(0.72), colour("third"))
    assert len({shade for _, shade in bars(figure, 0)}) == len(MIXED_PARTS)
    assert "ternary codes, 1.6 bits each" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_part_that_nobody_named_is_drawn_under_its_own_name() -> None:
    figure = bits_figure({"codes_2bit": 100}, 400, page.WIDE_INCHES)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["2bit codes"]


@pytest.mark.parametrize("width", WIDTHS_IN_INCHES)
@pytest.mark.parametrize("last", [1.9, 0.001])
def test_loss_figure_shows_both_losses_and_labels_its_axis(width: float, last: float) -> None:
    blocks = [{"index": 4, "loss_first": 2.0, "loss_last": last}, {"index": 5, "loss_first": 1.95, "loss_last": 1.92}]
    figure = loss_figure(blocks, width)
    axes = figure.axes[0]
    first, stored = axes.lines
    assert list(first.get_xdata()) == [4, 5] and list(first.get_ydata()) == [2.0, 1.95]
    assert list(stored.get_ydata()) == [last, 1.92]
    lowest, highest = axes.get_ylim()
    assert any(lowest <= tick <= highest for tick in axes.get_yticks())


def drawn_channels(figure: Figure) -> dict[str, dict[int, float]]:
    """Colour -> channel -> height of the dots in the first panel."""
    drawn = {}
    for line in figure.axes[0].lines:
        points = zip(line.get_xdata(), line.get_ydata(), strict=True)
        drawn[to_hex(line.get_color())] = {int(x): y for x, y in points if not math.isnan(x)}
    return drawn


@pytest.mark.parametrize("width", WIDTHS_IN_INCHES)
def test_channels_figure_colours_every_channel_by_its_width(width: float) -> None:
    widths = ["ternary", "4bit", "1bit", "ternary"]
    shown = Channels(3, "q_proj", "mean |x|", [1.0, 9.0, 0.5, 2.0], widths)
    figure = channels_figure([shown, shown], width)
    assert len(figure.axes) == 2
    assert drawn_channels(figure) == {
        colour("sign"): {2: 0.5},
        colour("third"): {0: 1.0, 3: 2.0},
        colour("salient"): {1: 9.0},
    }
    title = figure.axes[0].get_title(loc="left").replace("\n", " ")
    assert title == "block 3, q_proj: 1 × 1 bit, 2 × ternary, 1 × 4 bits"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1 bit", "ternary", "4 bits"]


def test_channels_of_the_paper_have_two_colours() -> None:
    shown = Channels(0, "q_proj", "mean |x|", [1.0, 9.0, 0.0, 2.0], ["1bit", "4bit", "1bit", "1bit"])
    figure = channels_figure([shown], page.NARROW_INCHES)
    assert drawn_channels(figure).keys() == {colour("sign"), colour("salient")}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1 bit", "4 bits"]


def test_channels_that_nothing_reached_can_be_drawn() -> None:
    figure = channels_figure([Channels(0, "q_proj", "mean |x|", [0.0, 0.0], ["1bit", "4bit"])], page.NARROW_INCHES)
    assert ElementTree.fromstring(page.svg(figure, "empty")).tag.endswith("svg")


@pytest.mark.parametrize("width", WIDTHS_IN_INCHES)
def test_learning_is_drawn_against_tokens_beside_what_is_held_out(width: float) -> None:
    (axes,) = learning_figure(TUNED, width).axes
    curve, held_out = axes.lines
    assert curve.get_xydata().tolist() == [[32.768, 1.4], [65.536, 1.3]]
    assert held_out.get_xydata().tolist() == [[0, 1.5], [65.536, 1.25]]
    assert axes.get_ylim()[0] == 0


def cells(figure: Figure) -> list[tuple[str, str]]:
    """(text, colour) of every cell of a corner, row by row; an empty colour where it is not filled."""
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    faces = [
        to_hex(patch.get_facecolor()) if patch.get_fill() and patch.get_facecolor()[3] else "" for patch in patches
    ]
    return list(zip(text_of(figure), faces, strict=True))


def test_corner_writes_signs_digits_and_levels() -> None:
    corner = Corner("q_proj", 0, [[1, 13, 1], [-1, -15, 0], [1, -1, -1]], ["1bit", "4bit", "ternary"])
    figure = corner_figure(corner, page.WIDE_INCHES)
    assert cells(figure) == [
        ("+", colour("sign")),
        ("13", colour("salient")),
        ("+", colour("third")),
        (MINUS, colour("sign_minus")),
        (f"{MINUS}15", colour("salient_minus")),
        ("0", ""),
        ("+", colour("sign")),
        (f"{MINUS}1", colour("salient_minus")),
        (MINUS, colour("third_minus")),
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1 bit", "ternary", "4 bits"]


def test_corner_explains_only_what_it_shows() -> None:
    figure = corner_figure(Corner("q_proj", 0, [[1, 1] * 30], ["1bit"] * 59 + ["4bit"]), page.NARROW_INCHES)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["1 bit"]


def test_a_narrow_corner_shows_fewer_channels() -> None:
    corner = Corner("q_proj", 0, [[1] * 60], ["1bit"] * 60)
    wide, narrow = (len(text_of(corner_figure(corner, width))) for width in WIDTHS_IN_INCHES)
    assert 0 < narrow < wide < 60


def test_every_code_width_and_method_can_be_shown() -> None:
    assert list(WIDTHS) == [width.name for width in MIXED_WIDTHS]
    assert EXPLANATIONS.keys() == METHODS.keys()
    for magnitude in Magnitude:
        assert objective_in_words({"magnitude": magnitude.value, "angular": False})


def test_svg_keeps_numbers_takes_theme_colours_and_is_the_same_every_time() -> None:
    drawn = bits_figure(PARTS, WEIGHTS, page.WIDE_INCHES)
    text = page.svg(drawn, "bits")
    ElementTree.fromstring(text)
    assert ">1.600<" in text
    assert "var(--sign)" in text
    assert not any(light in text for light, _ in COLOURS.values())
    assert text == page.svg(bits_figure(PARTS, WEIGHTS, page.WIDE_INCHES), "bits")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert ids and all(name.startswith("bits-") for name in ids)
    references = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text)
    assert references and set(references) <= set(ids)


def test_no_two_purposes_share_a_colour() -> None:
    lights = [light for light, _ in COLOURS.values()]
    assert len(set(lights)) == len(lights)  # they are told apart by it when the theme changes


def test_table_escapes_and_marks_numbers_and_totals() -> None:
    text = page.table(("a<b", "n"), [("<i>x</i>", "1"), ("all", "1")], numbers=(1,), totals=(1,))
    assert "<i>" not in text and "&lt;i&gt;x&lt;/i&gt;" in text and "a&lt;b" in text
    assert text.count('class="number"') == 3 and text.count("<tr class=total>") == 1


@pytest.mark.parametrize("format_of", ["results", "mixed_results"])
def test_page_is_whole_and_asks_for_nothing(format_of: str, request: pytest.FixtureRequest) -> None:
    text = model_page(request.getfixturevalue(format_of))
    outline = Outline(text)
    assert outline.open == []
    assert outline.tags.isdisjoint({"script", "link", "iframe", "object", "img", "base"})
    assert all(reference.startswith("#") for reference in outline.references)
    assert len(set(outline.ids)) == len(outline.ids)
    assert "@import" not in text and "url(http" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_page_says_the_numbers(results: ModelResults) -> None:
    text = Outline(model_page(results)).text
    for expected in (
        "Tiny at 1.60 bits per weight",
        "1.600 bits",
        "10.0×",
        "20.0 → 50.0",
        "2.50×",
        "5,110 tokens",
        "whole file5,000",
        "linear layers in all2,000",
        "gives 1.550",
        "Every block ends below its start.",
        "1.5 minutes and 1.5 GB",
        "It does not talk sense.",
        "ptq161 inspect tiny",
        "layers.0.q_proj, channels 7 to 10",
    ):
        assert expected in text, expected


def test_page_describes_the_papers_format(results: ModelResults) -> None:
    text = Outline(model_page(results)).text
    for expected in (
        "Nothing was retrained",
        f"80% become + or {MINUS} (1 bit); 20% become an odd number from {MINUS}15 to 15 (4 bits).",
        "salient columns keep 4 bits",
        "Signs and numbers stay fixed",
        "Mean squared error, plus negative logarithm of the cosine",
        "mean |x| in the original model",
    ):
        assert expected in text, expected
    for absent in ("ternary", "0 to 15", "learned together", "as a whole"):
        assert absent not in text, absent


def test_page_describes_the_mixed_format(mixed_results: ModelResults) -> None:
    text = Outline(model_page(mixed_results)).text
    for expected in (
        f"30% become + or {MINUS} (1 bit); 65% become +, 0 or {MINUS} (ternary); 5% become an odd number",
        "Codes and sizes are learned together",
        "Squared error relative to the square of what was wanted",
        "mean x² × sum of w²",
        "ternary codes, 1.6 bits each9000.7200",
        "which, 0.0800 bits per weight",
        "tuned as a whole",
        "The model as a whole",
        "on 65,536 tokens of parts of the text that the blocks were not learned on",
        "went from 1.500 to 1.250 nats per token.",
    ):
        assert expected in text, expected
    for absent in ("Nothing was retrained", "cosine", "salient columns", "no gain", "stay fixed"):
        assert absent not in text, absent


def test_page_says_when_tuning_gained_nothing(mixed_results: ModelResults) -> None:
    record = {**TUNED, "held_out_last": 1.75, "kept": False}
    text = Outline(model_page(replace(mixed_results, quantize={**mixed_results.quantize, "distillation": record}))).text
    assert "went from 1.500 to 1.750 nats per token. That is no gain" in text
    assert "tuned as a whole" not in text


def test_page_says_when_tuning_was_skipped(mixed_results: ModelResults) -> None:
    record = {"skipped": "needs about 9.0 GB more memory, 2.0 GB are free"}
    text = Outline(model_page(replace(mixed_results, quantize={**mixed_results.quantize, "distillation": record}))).text
    assert "it needs about 9.0 GB more memory" in text
    assert "tuned as a whole" not in text and "nats" not in text


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "on 65,536 tokens of parts of the text that the blocks were not learned on."),
        ({"fresh": False}, "on 65,536 tokens of the same text."),
        (
            {"fresh": False, "written_tokens": 4096},
            "the same text, lengthened by 4,096 that the original wrote itself.",
        ),
    ],
    ids=["fresh", "same", "written"],
)
def test_page_says_which_text_the_model_was_tuned_on(
    mixed_results: ModelResults, record: dict[str, Any], words: str
) -> None:
    quantize = {**mixed_results.quantize, "distillation": {**mixed_results.quantize["distillation"], **record}}
    assert words in Outline(model_page(replace(mixed_results, quantize=quantize))).text


def test_page_of_a_mixed_model_that_was_not_tuned(mixed_results: ModelResults) -> None:
    quantize = {**mixed_results.quantize, "distillation": None}
    text = Outline(model_page(replace(mixed_results, quantize=quantize))).text
    assert "as a whole" not in text and "Codes and sizes are learned together" in text


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_page_of_a_model_of_which_nothing_was_learned(mixed_results: ModelResults, preset: str) -> None:
    config = {**asdict(PRESETS[preset].quant), "epochs": 0}
    quantize = {**mixed_results.quantize, "distillation": None}
    text = Outline(model_page(replace(mixed_results, quantize=quantize, run={"config": config}))).text
    assert "Nothing was learned: " in text
    for absent in ("learned together", "what is learned", "learned, so", "after learning"):
        assert absent not in text, absent


def test_page_names_blocks_that_did_not_get_better(results: ModelResults) -> None:
    quantize = copy.deepcopy(dict(results.quantize))
    quantize["blocks"][1]["loss_last"] = 2.0
    text = Outline(model_page(replace(results, quantize=quantize))).text
    assert "Not better than its start: block 1." in text


def test_page_without_the_papers_formula(results: ModelResults) -> None:
    page_text = model_page(replace(results, inspect={**results.inspect, "paper_bits": None}))
    assert "paper's own formula" not in Outline(page_text).text


def test_what_a_model_writes_stays_text(results: ModelResults) -> None:
    hostile = "</p><script>alert(1)</script>&amp;<img src=http://x>"
    sample = Sample(hostile, hostile, hostile)
    page_text = model_page(replace(results, name=hostile, samples=[sample], commands=[hostile], caveats=[hostile]))
    outline = Outline(page_text)
    assert outline.tags.isdisjoint({"script", "img"}) and outline.open == []
    assert outline.text.count(hostile) >= 6
