"""The page and its figures: bytes and numbers arrive, foreign text stays text, nothing is loaded from outside."""

import copy
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ptq161.report import page
from ptq161.report.figures import (
    COLOURS,
    WHOLE,
    Channels,
    bits_figure,
    channels_figure,
    colour,
    corner_figure,
    loss_figure,
    storage_figure,
)
from ptq161.report.model_page import Corner, Evaluation, ModelResults, Sample, model_page

WIDTHS = (page.WIDE_INCHES, page.NARROW_INCHES)
PARTS = {"codes_1bit": 1000, "codes_4bit": 800, "columns": 0, "scales": 200}
WEIGHTS = 10_000


def evaluation(name: str, ppl: float, bits: float | None) -> Evaluation:
    entry = {"ppl": ppl, "tokens": 5110, "windows": 10, "seqlen": 512, "bos": False}
    return Evaluation(name, 5000, {"bits_per_weight": bits, "perplexity": {"held-out.txt": entry}})


@pytest.fixture
def results() -> ModelResults:
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
    }
    blocks = [{"index": i, "loss_first": 2.0, "loss_last": 1.0, "seconds": 1.0} for i in range(3)]
    return ModelResults(
        name="Tiny",
        source_label="source file",
        source_bytes=7000,
        quantize={"blocks": blocks, "seconds": 90.0, "peak_rss_bytes": 1_500_000_000},
        inspect=inspect,
        evaluations=[evaluation("original", 20.0, None), evaluation("packed", 50.0, 1.6)],
        channels=[Channels(0, "q_proj", "mean |x|", [1.0, 9.0, 0.0, 2.0], [False, True, False, False])],
        corner=Corner("layers.0.q_proj", [[1, 12, -1, 1]], [False, True, False, False]),
        samples=[Sample("Once", " upon a time", " the the")],
        commands=["ptq161 inspect tiny"],
        caveats=["It does not talk sense."],
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


@pytest.mark.parametrize("width", WIDTHS)
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
    assert labels == ["signs, 1 bit each", "4-bit codes", "row and column factors"]  # not the mask of no bytes


def test_a_part_that_nobody_named_is_drawn_under_its_own_name() -> None:
    figure = bits_figure({"codes_2bit": 100}, 400, page.WIDE_INCHES)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["2bit codes"]


@pytest.mark.parametrize("width", WIDTHS)
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


def test_channels_figure_colours_exactly_the_salient_channels() -> None:
    shown = Channels(0, "q_proj", "mean |x|", [1.0, 9.0, 0.0, 2.0], [False, True, False, False])
    figure = channels_figure([shown, shown], page.NARROW_INCHES)
    assert len(figure.axes) == 2
    others, salient = figure.axes[0].lines
    assert {x for x in salient.get_xdata() if not math.isnan(x)} == {1}
    assert {x for x in others.get_xdata() if not math.isnan(x)} == {0, 2, 3}
    assert to_hex(salient.get_color()) == colour("salient")
    assert max(y for y in salient.get_ydata() if not math.isnan(y)) == 9.0


def test_channels_that_nothing_reached_can_be_drawn() -> None:
    figure = channels_figure([Channels(0, "q_proj", "mean |x|", [0.0, 0.0], [False, True])], page.NARROW_INCHES)
    page.svg(figure, "empty")


def test_corner_writes_signs_and_codes() -> None:
    figure = corner_figure([[1, 12, -1], [-1, 0, 1]], [False, True, False], page.WIDE_INCHES)
    assert text_of(figure) == ["+", "12", "−", "−", "0", "+"]


def test_a_narrow_corner_shows_fewer_channels() -> None:
    salient, codes = [False] * 60, [[1] * 60]
    wide, narrow = (len(text_of(corner_figure(codes, salient, width))) for width in WIDTHS)
    assert 0 < narrow < wide < 60


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


def test_page_is_whole_and_asks_for_nothing(results: ModelResults) -> None:
    text = model_page(results)
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
    ):
        assert expected in text, expected


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
