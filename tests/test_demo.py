"""What README and the demo promise: their commands parse and run, their links lead somewhere, nothing is done twice."""

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ptq161 import cli
from ptq161.arguments import parse
from ptq161.binarize import FOUR_BIT, ONE_BIT, ColumnGroup, QuantizedWeight
from ptq161.linear import PackedLinear
from ptq161.options import compare_settings, preprocess_settings, quantize_settings
from ptq161.packing import pack

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\s*(\.venv/bin/)?ptq161 ")
PRESETS = ["paper", "best"]  # one for each method
CONVERSING = {"chat", "serve"}  # wait for people and clients: test_chat.py, test_serve.py
TINY = ["--salient-ratio", "0.2", "--samples", "4", "--seqlen", "16", "--epochs", "1", "--set", "distill_tokens=128"]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [body for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> list[list[str]]:
    """Arguments of every ptq161 command line on a page, in fenced or in indented blocks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for kind, body in BLOCK.findall(text) if kind != "python" for line in body.splitlines()]
    lines += [line for line in BLOCK.sub("", text).splitlines() if line.startswith("    ")]
    split = [shlex.split(line, comments=True) for line in lines if COMMAND.match(line)]
    return [words[1:] for words in split]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_command_on_a_page_is_one_that_exists(page: Path) -> None:
    for arguments in commands(page):
        parsed = parse(arguments)
        if arguments[0] == "quantize":
            quantize_settings(parsed)
        if arguments[0] == "compare":
            compare_settings(parsed)
        if arguments[0] == "preprocess":
            preprocess_settings(parsed)


def test_readme_has_commands() -> None:
    names = {arguments[0] for arguments in commands(REPOSITORY / "README.md")}
    expected = {"quantize", "preprocess", "compare", "report", "eval", "inspect", "verify", "generate", *CONVERSING}
    assert names == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("target", ["env", "demo", "test", "check", "bench"])
def test_makefile_has_the_targets(target: str) -> None:
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_readme_runs_from_quantize_to_generate(
    llama_folder: Path,
    calibration_file: Path,
    evaluation_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    replaced = {
        "path/to/model": str(llama_folder),
        "text.txt": str(calibration_file),
        "held-out.txt": str(evaluation_file),
    }
    tiny = {
        "quantize": TINY,
        "preprocess": ["--steps", "2", "--seqlen", "16"],
        "compare": ["--methods", "rtn-w2", "--samples", "2", "--seqlen", "16", "--window", "32"],
        "eval": ["--seqlen", "32"],
        "generate": ["--max-new-tokens", "4"],
    }
    ran = []
    for arguments in commands(REPOSITORY / "README.md"):
        if not any("my-model" in argument or "comparison" in argument for argument in arguments):
            continue  # the demo's own folder
        if arguments[0] in CONVERSING:
            continue
        shortened = [replaced.get(argument, argument) for argument in arguments] + tiny.get(arguments[0], [])
        assert cli.main(shortened) == 0, capsys.readouterr().err
        ran.append(arguments[0])
    first = ["quantize", "quantize", "eval", "inspect", "verify", "generate"]
    assert ran == [*first, "preprocess", "quantize", "compare", "report"]
    for code in blocks(REPOSITORY / "README.md", "python"):
        exec(compile(code, "README.md", "exec"), {})


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """demo/run.py as a module, as `python demo/run.py` would see it."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "demo"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
    import run

    yield run
    for name in ("run", "steps", "channels"):
        sys.modules.pop(name, None)


def in_this_process(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
    """What subprocess.run does with a command of ptq161, without waiting for its imports."""
    out = io.StringIO()
    with redirect_stdout(out):
        status = cli.main(command[3:])
    return subprocess.CompletedProcess(command, status, stdout=out.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_demo_writes_its_page_and_does_nothing_twice(
    demo: ModuleType,
    preset: str,
    llama_folder: Path,
    calibration_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if preset == "paper":
        monkeypatch.setattr(subprocess, "run", in_this_process)  # once is enough for starting a process per command
    settings = demo.Settings(
        name="Tiny <llama>",
        model=llama_folder,
        text=calibration_file,
        quantize=("--preset", preset, *TINY),
        seqlen=32,
        windows=2,
        prompts=("The river",),
        new_tokens=3,
        packed=tmp_path / "out" / "packed",
        record=tmp_path / "out" / "steps.json",
        report=tmp_path / "report.html",
    )
    demo.main(settings)
    first, page = capfd.readouterr().out, settings.report.read_text()
    assert "Tiny &lt;llama&gt; at" in page and "neither picked nor edited" in page
    assert ("ternary" in page) == ("nats per token" in page) == (preset == "best")
    shown = [line[2:] for line in first.splitlines() if line.startswith("$ ")]
    assert [shlex.split(line)[1] for line in shown] == ["quantize", "eval", "eval", "generate", "generate", "inspect"]
    for line in shown:
        parse(shlex.split(line)[1:])
    assert "used again" not in first

    demo.main(settings)
    second = capfd.readouterr().out
    assert second.count("used again") == len(shown) + 1  # the channels are no command
    assert settings.report.read_text() == page


@pytest.fixture
def asked(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that the demo's steps have run; none runs really, each prints {"number": how many so far}."""
    seen: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.append(command[3:])
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps({"number": len(seen)}))

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_step_is_repeated_only_after_a_change(demo: ModuleType, asked: list[list[str]], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("one")

    def step(*arguments: str) -> int:
        number: int = demo.Steps(tmp_path / "steps.json").run("title", ["eval", *arguments], reads=[text])["number"]
        return number

    assert [step("a"), step("a"), step("b"), step("a")] == [1, 1, 2, 1]
    text.write_text("other")
    assert [step("a"), step("a")] == [3, 3]
    assert asked == [["eval", name, "--json"] for name in ("a", "b", "a")]


def test_step_replaces_a_folder_of_another_command(demo: ModuleType, asked: list[list[str]], tmp_path: Path) -> None:
    steps, out = demo.Steps(tmp_path / "steps.json"), tmp_path / "out"
    steps.run("title", ["quantize"], reads=[], writes=out)
    out.mkdir()
    (out / "config.json").write_text("{}")
    steps.run("title", ["quantize", "--epochs", "1"], reads=[], writes=out)
    steps.run("title", ["quantize", "--epochs", "1"], reads=[], writes=out)
    assert asked == [["quantize", "--json"], ["quantize", "--epochs", "1", "--overwrite", "--json"]]
    (out / "config.json").unlink()
    out.rmdir()
    steps.run("title", ["quantize", "--epochs", "1"], reads=[], writes=out)
    assert asked[-1] == ["quantize", "--epochs", "1", "--json"] and len(asked) == 3


@pytest.mark.slow
def test_demo_stops_at_a_command_that_fails(
    demo: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = demo.Settings(
        model=tmp_path / "absent.gguf",
        packed=tmp_path / "packed",
        record=tmp_path / "steps.json",
        report=tmp_path / "report.html",
    )
    with pytest.raises(demo.StepFailed) as failed:
        demo.main(settings)
    assert failed.value.code == 2
    assert "absent.gguf" in capfd.readouterr().err.splitlines()[-1]
    assert not settings.report.exists()


def test_settings_of_the_demo_are_ones_that_exist(demo: ModuleType) -> None:
    quantize_settings(parse(["quantize", "model", "out", *demo.Settings().quantize, "--calib", "text.txt"]))


LEVELS = {"1bit": {-1, 1}, "ternary": {-1, 0, 1}, "4bit": set(range(-15, 16, 2))}


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_channels_of_the_demo_are_wider_the_more_they_count(
    demo: ModuleType,
    preset: str,
    llama_folder: Path,
    calibration_file: Path,
    tmp_path: Path,
) -> None:
    import channels

    packed = tmp_path / "packed"
    tiny = ["--preset", preset, *TINY]
    assert cli.main(["quantize", str(llama_folder), str(packed), "--calib", str(calibration_file), *tiny]) == 0
    measured = channels.measure(llama_folder, packed)
    expected = ["1bit", "ternary", "4bit"] if preset == "best" else ["1bit", "4bit"]
    assert [shown["block"] for shown in measured["channels"]] == [0, 0, 1]
    for shown in measured["channels"]:
        assert ("²" in shown["measure"]) == (preset == "best")
        by_width = {
            width: [m for m, other in zip(shown["importance"], shown["widths"], strict=True) if other == width]
            for width in expected
        }
        assert sum(len(values) for values in by_width.values()) == len(shown["importance"])
        for narrow, wide in pairwise(expected):
            assert max(by_width[narrow]) * (1 - 1e-4) <= min(by_width[wide])
    corner = measured["corner"]
    first, count = corner["first_channel"], len(corner["widths"])
    assert corner["widths"] == measured["channels"][0]["widths"][first : first + count]
    assert set(corner["widths"]) == set(expected)
    for row in corner["codes"]:
        for level, width in zip(row, corner["widths"], strict=True):
            assert level in LEVELS[width]


def test_corner_starts_where_every_width_is_near(demo: ModuleType) -> None:
    import channels

    rows, cols = 3, 100
    for where in (0, 60, 83):
        narrow, wide = torch.tensor([c for c in range(cols) if c != where]), torch.tensor([where])
        groups = [
            ColumnGroup(columns, width, torch.ones(rows, len(columns), dtype=torch.int8), torch.ones(rows, 1))
            for columns, width in ((narrow, ONE_BIT), (wide, FOUR_BIT))
        ]
        corner = channels.corner("linear", PackedLinear.of(pack(QuantizedWeight(tuple(groups)))))
        assert len(corner["widths"]) == channels.CORNER_COLUMNS
        assert corner["first_channel"] == max(0, where - channels.NARROW_COLUMNS + 1)
        assert corner["widths"].index("4bit") == where - corner["first_channel"]
