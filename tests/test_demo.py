"""What README and the demo promise: their commands parse and run, their links lead somewhere, nothing is done twice."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ptq161 import cli
from ptq161.arguments import parse, quantize_settings

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\s*(\.venv/bin/)?ptq161 ")
TINY = ["--salient-ratio", "0.2", "--samples", "4", "--seqlen", "16", "--epochs", "1"]


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


def test_readme_has_commands() -> None:
    names = {arguments[0] for arguments in commands(REPOSITORY / "README.md")}
    assert names == {"quantize", "eval", "inspect", "verify", "generate"}


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
    tiny = {"quantize": TINY, "eval": ["--seqlen", "32"], "generate": ["--max-new-tokens", "4"]}
    ran = []
    for arguments in commands(REPOSITORY / "README.md"):
        if not any("my-model" in argument for argument in arguments):
            continue  # the demo's own folder
        shortened = [replaced.get(argument, argument) for argument in arguments] + tiny.get(arguments[0], [])
        assert cli.main(shortened) == 0, capsys.readouterr().err
        ran.append(arguments[0])
    assert ran == ["quantize", "quantize", "eval", "inspect", "verify", "generate"]
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


@pytest.mark.slow
def test_demo_writes_its_page_and_does_nothing_twice(
    demo: ModuleType,
    llama_folder: Path,
    calibration_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = demo.Settings(
        name="Tiny <llama>",
        model=llama_folder,
        text=calibration_file,
        quantize=tuple(TINY),
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
    assert "Tiny &lt;llama&gt; at" in page and "does not talk sense" in page
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


@pytest.mark.slow
def test_channels_of_the_demo_are_those_that_the_mask_keeps(
    demo: ModuleType, llama_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    import channels

    packed = tmp_path / "packed"
    assert cli.main(["quantize", str(llama_folder), str(packed), "--calib", str(calibration_file), *TINY]) == 0
    measured = channels.measure(llama_folder, packed)
    assert len(measured["channels"]) == 3
    for shown in measured["channels"]:
        kept = [m for m, salient in zip(shown["magnitude"], shown["salient"], strict=True) if salient]
        left = [m for m, salient in zip(shown["magnitude"], shown["salient"], strict=True) if not salient]
        assert kept and min(kept) >= max(left) * (1 - 1e-4)
    corner = measured["corner"]
    for row in corner["codes"]:
        for level, salient in zip(row, corner["salient"], strict=True):
            assert level in (range(16) if salient else (-1, 1))
