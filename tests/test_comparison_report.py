"""The page about a comparison: its numbers are those of the rows, its pictures theirs, and it stands alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex
from test_maps import MAPS
from test_report import Outline

from ptq161 import cli, shapes
from ptq161.before_after import SALIENT_MAPS
from ptq161.discovery import decoder_blocks
from ptq161.errors import InputError
from ptq161.evaluate.channels import channel_magnitudes, width_map
from ptq161.inspection import inspect
from ptq161.methods import BASELINES
from ptq161.report import comparison_figures as figures
from ptq161.report import page
from ptq161.report.comparison import ABLATION_COLUMNS, RESULT_COLUMNS, Comparison, arranged, read_rows
from ptq161.report.comparison_page import comparison_page
from ptq161.report.drawings import drawings, task_scores
from ptq161.report.families import bits_by_label, family_of
from ptq161.report.palette import COLOURS, colour
from ptq161.report.writing import write_report
from ptq161.sources import open_model

TEXTS = ("texts/wiki.raw", "texts/c4.jsonl[1000:1480]")
WIDTHS_IN_INCHES = (page.WIDE_INCHES, page.NARROW_INCHES)
CONFIGS = Path(__file__).parent / "configs"


def row(method: str, ppl: float | None, bits: float | None = None, **more: Any) -> dict[str, Any]:
    """A row of results.jsonl, in short."""
    entry = {"tokens": 62, "windows": 2, "seqlen": 32, "bos": None}
    return {
        "model": "models/Tiny.Q4_1.gguf",
        "method": method,
        "preprocessing": None,
        "calib": {"train.txt": 4096},
        "bits_per_weight": bits,
        "claimed_bits": None if bits is None else 2.0,
        "bits_by_part": None if bits is None else {"codes": 2000, "bitmap": 500, "scales": int(1000 * bits) - 2500},
        "quantized_weights": None if bits is None else 1000,
        "perplexity": None if ppl is None else {text: entry | {"ppl": ppl * k} for k, text in enumerate(TEXTS, 1)},
        "block_errors": [0.01, 0.1, None],
        "tasks": None,
        "seconds": None if bits is None else 90.0,
        "peak_rss_bytes": 1_500_000_000,
        "threads": 1,
        "seed": 0,
        "dtype": "float32",
        "version": "0.1.0",
        "versions": {"torch": "2.13.0"},
        "command": "ptq161 compare TINY",
        "status": "ok" if ppl else "skipped",
        "reason": None if ppl else "it has <no> linears",
    } | more


def all_rows() -> list[dict[str, Any]]:
    return [
        row("full-precision", 20.0),
        row("gptq-w2g128", 5000.0, 2.75),
        row("paper:epochs=4", 50.0, 2.6),
        row("billm", 800.0, 2.95),
        row("paper:epochs=4", 40.0, 2.6, preprocessing="restored"),
        row("owq-w2", None),
    ]


def whole_comparison(rows: list[dict[str, Any]]) -> Comparison:
    channels = [{"block": 0, "linear": "q_proj", "inputs": [1.0, 9.0, 0.5], "weights": [0.1, 0.2, 0.1]}]
    ablations = {"x/rows.jsonl": [{"variant": "full precision"} | rows[0], {"variant": "no mask"} | rows[1]]}
    maps = {"paper": [["1bit", "4bit", "1bit"], ["1bit", "1bit", "4bit"]]}
    memory = {"LLaMA-7B": {"16 bits": 13_480_000_000, "PTQ1.61": 1_830_000_000}}
    return arranged(rows, Path("r"), ablations=ablations, channels=channels, maps=maps, memory=memory)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return all_rows()


@pytest.fixture
def comparison(rows: list[dict[str, Any]]) -> Comparison:
    return whole_comparison(rows)


@pytest.fixture(scope="module")
def whole_page() -> str:
    """The page of the comparison above, drawn once."""
    return comparison_page(whole_comparison(all_rows()))


def text_of(comparison: Comparison) -> str:
    return Outline(comparison_page(comparison)).text


# Rows


def test_rows_are_numbered_from_the_least_perplexity(comparison: Comparison) -> None:
    assert [(entry.number, entry.label) for entry in comparison.entries] == [
        (1, "paper:epochs=4, preprocessed"),
        (2, "paper:epochs=4"),
        (3, "billm"),
        (4, "gptq-w2g128"),
    ]
    assert [left["method"] for left in comparison.left_out] == ["owq-w2"]
    assert comparison.name == "Tiny.Q4_1" and comparison.texts == list(TEXTS)


def test_a_comparison_needs_full_precision(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"there.jsonl has no row at full precision"):
        arranged(rows[1:], Path("there.jsonl"))


def test_every_method_is_described() -> None:
    for method in ("paper:epochs=4", "fast", "best", "full-precision", "llamacpp:IQ1_S", *BASELINES):
        assert family_of({"method": method}).what != "not described here", method
    assert family_of({"method": "ptq161"}).name == "PTQ1.61"
    assert family_of({"method": None}).name == "full precision"
    assert family_of({"method": "new-w9"}).name == "new-w9"


def test_parts_add_up_to_the_bits() -> None:
    shares = bits_by_label(row("billm", 1.0, 2.95))
    assert sum(bits for _, bits in shares.values()) == pytest.approx(2.95)
    assert shares["which weight is of which kind"] == ("columns", 0.5)
    assert all(purpose in COLOURS for purpose, _ in shares.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": 1}\n{', "line 1 has no 'method'"),
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 has no 'model'"),
        ("", "is empty"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / "r.jsonl", RESULT_COLUMNS)
    with pytest.raises(InputError, match="cannot read rows from"):
        read_rows(tmp_path / "none.jsonl", ABLATION_COLUMNS)


# Figures


@pytest.mark.parametrize("width", WIDTHS_IN_INCHES)
def test_bits_figure_has_a_filled_and_a_hollow_dot_for_every_row(comparison: Comparison, width: float) -> None:
    axes = figures.bits_figure(comparison, TEXTS[0], width).axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    filled = [line for line in dots if line.get_markerfacecolor() != "none"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in filled] == [
        (2.6, 2.0),
        (2.6, 2.5),
        (2.95, 40.0),
        (2.75, 250.0),
    ]
    assert [line.get_xdata()[0] for line in dots if line not in filled] == [2.0] * 4
    assert [to_hex(line.get_color()) for line in filled[1:3]] == [colour("sign"), colour("muted")]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4"]


def test_parts_figure_draws_bars_as_long_as_the_bits(comparison: Comparison) -> None:
    axes = figures.parts_figure(list(comparison.entries), page.WIDE_INCHES).axes[0]
    assert [text.get_text() for text in axes.texts] == ["2.60", "2.60", "2.95", "2.75"]
    assert sum(bar.get_width() for bar in axes.patches) == pytest.approx(2.6 + 2.6 + 2.95 + 2.75)


def test_blocks_figure_names_ours_and_the_best_others(comparison: Comparison) -> None:
    figure = figures.blocks_figure(list(comparison.entries), 1, page.WIDE_INCHES)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "1 paper:epochs=4, preprocessed",
        "2 paper:epochs=4",
        "3 billm",
    ]
    assert to_hex(figure.axes[0].lines[0].get_color()) == colour("dense")
    assert list(figure.axes[0].lines[0].get_ydata())[:2] == [0.01, 0.1]


def test_effort_figure_says_minutes_and_memory(comparison: Comparison) -> None:
    axes = figures.effort_figure(list(comparison.entries), page.NARROW_INCHES).axes[0]
    assert axes.texts[0].get_text() == " 1.5 min, 1.5 GB"


def test_map_figure_marks_the_wider_channels() -> None:
    axes = figures.map_figure([["1bit", "4bit", "1bit"], ["1bit", "1bit", "4bit"]], page.WIDE_INCHES).axes[0]
    marked = [segment[0].tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert marked == [[1.0, -0.5], [2.0, 0.5]]


# Page


def test_page_says_the_numbers(whole_page: str) -> None:
    text = Outline(whole_page).text
    for expected in (
        "Tiny.Q4_1: 3 ways to make it smaller",
        "4,096 tokens of train.txt",
        "paper:epochs=42.0002.60050.02.50",
        "billm2.0002.95080040.0",
        "owq-w2 skipped: it has <no> linears",
        "best other below 3 bits: billm at 2.95 bits",
        "wiki.raw, 2 windows of 32 tokens",
        "no mask2.7505,00010,000250250",
        "LLaMA-7B13.481.83",
        "ptq161 compare TINY",
        "ptq161 0.1.0, torch 2.13.0, seed 0, dtype float32",
    ):
        assert expected in text, expected


def test_page_is_whole_and_asks_for_nothing(whole_page: str) -> None:
    outline = Outline(whole_page)
    assert outline.open == []
    assert outline.tags.isdisjoint({"script", "link", "iframe", "object", "img", "base"})
    assert all(reference.startswith("#") for reference in outline.references)
    assert len(set(outline.ids)) == len(outline.ids)
    assert "@import" not in whole_page and "url(http" not in whole_page


def test_page_leaves_out_what_nobody_measured(rows: list[dict[str, Any]]) -> None:
    """Rows as `ptq161 eval --out` writes them."""
    columns = {*RESULT_COLUMNS, "seconds", "version", "seed", "reason"}
    short = [{key: value for key, value in line.items() if key in columns} for line in rows[:3]]
    short[0]["method"] = None
    comparison = arranged([line | {"seconds": None} for line in short], Path("r"))
    assert set(drawings(comparison)) == {"bits-1", "bits-2"}
    text = text_of(comparison)
    for absent in ("What it takes", "Block by block", "Tasks", "Larger models", "None"):
        assert absent not in text, absent


def test_tasks_have_error_bars(rows: list[dict[str, Any]]) -> None:
    rows[0]["tasks"] = {"piqa": {"acc": 0.7, "acc_stderr": 0.01, "n": 300}}
    rows[2]["tasks"] = {"piqa": {"acc": 0.6, "acc_stderr": 0.02, "n": 300}}
    comparison = arranged(rows, Path("r"))
    scores = {"piqa: acc": [("full precision", 0.7, 0.01), ("paper:epochs=4", 0.6, 0.02)]}
    assert task_scores(comparison) == scores
    assert "0.600 ± 0.020" in text_of(comparison)
    axes = figures.tasks_figure(scores, page.WIDE_INCHES).axes[0]
    bars = [container.lines[2][0].get_segments()[0] for container in axes.containers]
    assert [bar[:, 0].tolist() for bar in bars] == [pytest.approx([0.69, 0.71]), pytest.approx([0.58, 0.62])]


def test_filtered_metrics_find_their_error(rows: list[dict[str, Any]]) -> None:
    rows[0]["tasks"] = {"gsm8k": {"exact_match,strict": 0.1, "exact_match_stderr,strict": 0.05, "n": 9}}
    assert task_scores(arranged(rows, Path("r"))) == {"gsm8k: exact_match,strict": [("full precision", 0.1, 0.05)]}


def test_perplexity_of_a_task_is_no_share(rows: list[dict[str, Any]]) -> None:
    rows[0]["tasks"] = {
        "lambada": {"perplexity": 43.4, "perplexity_stderr": 6.9, "acc": 0.3, "acc_stderr": 0.02, "n": 9}
    }
    assert task_scores(arranged(rows, Path("r"))) == {"lambada: acc": [("full precision", 0.3, 0.02)]}


def test_files(comparison: Comparison, whole_page: str, tmp_path: Path) -> None:
    result = write_report(comparison, tmp_path)
    assert (tmp_path / "report.html").read_text() == whole_page
    assert set(result["figures"]) == {"bits-1", "bits-2", "parts", "blocks", "effort", "channels", "map-paper"}
    for path in result["figures"].values():
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot write the report"):
        write_report(comparison, tmp_path / "none")


# What the command adds


def test_magnitudes_are_means_over_the_samples(llama_folder: Path) -> None:
    model, _ = open_model(llama_folder)
    samples = torch.arange(40).view(2, 20)
    entries = channel_magnitudes(model, samples)
    assert [(entry["block"], entry["linear"]) for entry in entries] == [
        (0, "self_attn.q_proj"),
        (0, "mlp.down_proj"),
        (1, "self_attn.q_proj"),
        (1, "mlp.down_proj"),
    ]
    block = decoder_blocks(model)[1][0]
    with torch.no_grad():
        expected = block.input_layernorm(model.get_input_embeddings()(samples)).abs().mean(dim=(0, 1))
    torch.testing.assert_close(torch.tensor(entries[0]["inputs"]), expected)
    weight = block.self_attn.q_proj.weight
    torch.testing.assert_close(torch.tensor(entries[0]["weights"]), weight.detach().abs().mean(dim=0))


def test_map_counts_the_channels_that_inspect_counts(chat_folder: Path) -> None:
    rows, layers = width_map(chat_folder), inspect(chat_folder)["layers"]
    assert len(rows) == 2
    counted = [{width: of_block.count(width) for width in set(of_block)} for of_block in rows]
    assert all(count in [layer["columns"] for layer in layers] for count in counted)


def test_memory_of_a_7b_is_what_inspect_predicts() -> None:
    sizes = shapes.format_bytes(shapes.MODELS["LLaMA-7B, LLaMA-2-7B"]())
    predicted = inspect(CONFIGS / "llama-7b.json")
    assert sizes["PTQ1.61"] == predicted["file_bytes"] - predicted["header_bytes"]
    assert sizes["16 bits"] == 2 * 6_738_415_616
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    rest = sizes["16 bits"] - 2 * linears
    assert sizes["BiLLM"] - rest == pytest.approx(linears * (2 + 7 * 16 / 128) / 8, rel=1e-3)
    assert sizes["PB-LLM"] - rest == pytest.approx(linears * 2.7 / 8, rel=5e-3)
    assert sizes["GPTQ w2g128"] - rest == linears * (2 + 18 / 128) / 8


def test_the_command_writes_page_and_pictures(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    comparison: Comparison,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shapes, "MODELS", {})  # building them takes seconds
    rows[-2]["preprocessing"] = str(tmp_path / "restored")
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    (tmp_path / "restored").mkdir()
    (tmp_path / "restored" / SALIENT_MAPS).write_text(json.dumps(MAPS))
    (tmp_path / "channels.json").write_text(json.dumps(comparison.channels))
    ablations = tmp_path / "ablations.jsonl"
    ablations.write_text(json.dumps({"variant": "full precision"} | rows[0]) + "\n")
    assert cli.main(["report", str(tmp_path), "--ablations", str(ablations), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["figures"]) == {"bits-1", "bits-2", "parts", "blocks", "effort", "channels", "salient"}
    assert "What preprocessing moves" in Path(result["page"]).read_text()
    assert "One thing changed at a time" in Path(result["page"]).read_text()
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "cannot read rows from" in capsys.readouterr().err
