"""Methods side by side on one model: the same calibration tokens, the same evaluation tokens, one row each.

A comparison is a folder. `comparison.json` says what it is a comparison of, `results.jsonl` has a row for every method
that is done, `channels.json` is for the report, and `models` has the packed checkpoints. Run again, it makes the rows
that are not there or were not ok.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

import ptq161
from ptq161 import machine
from ptq161.checkpoint import differences, locked, write_atomically
from ptq161.config import CalibrationConfig
from ptq161.contenders import FULL_PRECISION, Contender, OnStep, Subject, contender, full_precision
from ptq161.data import SELF, calibration_tokens, evaluation_tokens, parse_source, shares
from ptq161.errors import InputError, Ptq161Error
from ptq161.evaluate.channels import channel_magnitudes
from ptq161.evaluate.drift import block_errors, block_outputs
from ptq161.evaluate.perplexity import perplexity
from ptq161.records import fingerprint
from ptq161.sources import open_dense

RESULTS, JOB, CHANNELS, MODELS = "results.jsonl", "comparison.json", "channels.json", "models"
WATCHED_SAMPLES = 4  # calibration samples that channels are measured on, for the report


@dataclass(frozen=True)
class Settings:
    """What a comparison is made on. calibration: of every method. windows: None for all of each text's.

    ppl: the texts to be predicted, as typed. preprocessed: a second model to give every method, besides the original.
    """

    methods: tuple[str, ...]
    calibration: CalibrationConfig
    ppl: tuple[str, ...]
    window: int
    max_windows: int | None
    preprocessed: str | None
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Evaluation:
    """What every row is measured by. wanted: the original's hidden states on the first window, block by block."""

    texts: Mapping[str, Int64[Tensor, " tokens"]]
    settings: Settings
    wanted: list[Float[Tensor, "1 window hidden"]]

    @property
    def first_window(self) -> Int64[Tensor, " window"]:
        return next(iter(self.texts.values()))[: self.settings.window]

    def __call__(self, model: PreTrainedModel, on_step: OnStep) -> Iterator[tuple[str, Any]]:
        """Columns of the row, as they are known."""
        settings = self.settings
        yield "block_errors", block_errors(model, self.first_window, self.wanted)
        measured: dict[str, Any] = {}
        for source, tokens in self.texts.items():
            measured[source] = perplexity(
                model,
                tokens,
                settings.window,
                max_windows=settings.max_windows,
                on_window=lambda done, total: on_step("window", done, total),
            )
        yield "perplexity", measured


def compare(
    model: str,
    out: str | Path,
    settings: Settings,
    *,
    command: str | None = None,
    restart: bool = False,
    on_step: Callable[[str, str, int, int], None] = lambda row, what, done, total: None,
) -> dict[str, Any]:
    """Make every row of a comparison that its folder does not have yet.

    command: what to type for it, for the rows. restart: drop what is there. on_step: told the row at work, what it is
    doing, how many steps are done and how many there are.

    A method that cannot take the model gives a row with status `skipped`, one that fails a row with status `failed`,
    both with the reason. Returns the JSON of `ptq161 compare --json`. Raises InputError for a bad argument, or if the
    folder holds a comparison on another model, other text or other settings.
    """
    out = Path(out)
    contenders = {name: contender(name) for name in settings.methods}
    for source in settings.ppl:
        parse_source(source)
    if not out.parent.is_dir() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: expected a folder to be made, or one that an earlier comparison has made")
    with locked(out, f"another process is comparing in {out}"):
        subjects, texts = _subjects(model, out / MODELS, settings)
        _claim(out, _job(subjects, texts, settings), restart=restart)
        evaluation = Evaluation(texts, settings, [])
        original = subjects[0].fresh()
        original.to(settings.device, settings.dtype)  # type: ignore[arg-type]
        evaluation = replace(evaluation, wanted=block_outputs(original, evaluation.first_window))
        if not (out / CHANNELS).exists():
            magnitudes = json.dumps(channel_magnitudes(original, subjects[0].samples[:WATCHED_SAMPLES]))
            write_atomically(out / CHANNELS, lambda path: path.write_text(magnitudes))
        del original
        for name, made_by in {FULL_PRECISION: full_precision, **contenders}.items():
            for subject in subjects:
                label = name if subject.preprocessing is None else f"{name} (preprocessed)"
                rows = read_rows(out)
                if any(_same(row, name, subject) and row["status"] == "ok" for row in rows):
                    continue

                def step(what: str, done: int, total: int, label: str = label) -> None:
                    on_step(label, what, done, total)

                row = _row(name, made_by, subject, evaluation, step) | {"command": command}
                kept = [other for other in rows if not _same(other, name, subject)]
                write_rows(out, [*kept, row])
    return {"model": model, "out": str(out), "rows": read_rows(out)}


def _subjects(
    model: str, folder: Path, settings: Settings
) -> tuple[list[Subject], dict[str, Int64[Tensor, " tokens"]]]:
    """The original and, where there is one, the preprocessed model; and the evaluation texts, which both must share."""
    calibration = settings.calibration
    itself = SELF in (parse_source(source).name for source in calibration.sources)
    if itself and settings.preprocessed is not None:
        raise InputError("--calib self with --preprocessed: each model would sample another text; name a file instead")
    subjects, read = [], []
    for path, preprocessing in ((model, None), (settings.preprocessed, settings.preprocessed)):
        if path is None:
            continue
        dense, tokenizer = open_dense(path)
        samples = calibration_tokens(calibration, tokenizer, dense.whole() if itself else dense.skeleton)
        read.append({"samples": samples} | {source: evaluation_tokens(source, tokenizer) for source in settings.ppl})
        kept = folder / ("original" if preprocessing is None else "preprocessed")
        subjects.append(
            Subject(path, preprocessing, dense, calibration, samples, settings.device, settings.dtype, kept)
        )
    if any(not tokens.equal(read[-1][name]) for name, tokens in read[0].items()):
        raise InputError(f"{settings.preprocessed} and {model} cut text into different tokens: expected one tokenizer")
    return subjects, {source: read[0][source] for source in settings.ppl}


def _job(
    subjects: Sequence[Subject], texts: Mapping[str, Int64[Tensor, " tokens"]], settings: Settings
) -> dict[str, Any]:
    """What all rows of a comparison have in common; reads all weights once."""
    calibration = subjects[0].calibration
    models = {subject.preprocessing or "model": fingerprint(subject.dense.weights) for subject in subjects}
    return {
        "model": models.pop("model"),
        "preprocessed": next(iter(models.values()), None),
        "calibration": {
            "sources": list(calibration.sources),
            "samples": calibration.samples,
            "seqlen": calibration.seqlen,
            "seed": calibration.seed,
            "tokens": fingerprint({"tokens": subjects[0].samples}),
        },
        "evaluation": {source: fingerprint({"tokens": tokens}) for source, tokens in texts.items()},
        "window": settings.window,
        "max_windows": settings.max_windows,
        "device": settings.device.type,
        "dtype": str(settings.dtype).removeprefix("torch."),
    }


def _claim(out: Path, job: Mapping[str, Any], *, restart: bool) -> None:
    """Start a comparison in a folder, or make sure that the one in there is the same. Raises InputError."""
    path = out / JOB
    if restart and path.exists():
        shutil.rmtree(out / MODELS, ignore_errors=True)
        for name in (RESULTS, CHANNELS, JOB):
            (out / name).unlink(missing_ok=True)
    if path.exists():
        different = differences(json.loads(path.read_text(encoding="utf-8")), job)
        if different:
            raise InputError(
                f"{out} holds a comparison on other ground ({different}); repeat its settings to continue it, choose "
                "another folder, or give --restart to drop it"
            )
    elif {entry.name for entry in out.iterdir()} - {"lock", f"{JOB}.new"}:
        raise InputError(f"{out} is no folder of a comparison and not empty: choose another one")
    else:
        write_atomically(path, lambda target: target.write_text(json.dumps(job, indent=1), encoding="utf-8"))


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a comparison so far."""
    path = out / RESULTS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the rows in one step: whatever kills the process, the file has whole lines."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_atomically(out / RESULTS, lambda path: path.write_text(text, encoding="utf-8"))


def _same(row: Mapping[str, Any], name: str, subject: Subject) -> bool:
    return (row["method"], row["preprocessing"]) == (name, subject.preprocessing)


def _row(name: str, made_by: Contender, subject: Subject, evaluation: Evaluation, on_step: OnStep) -> dict[str, Any]:
    """Make one candidate and measure it. The columns that nobody came to know are null."""
    calibration = subject.calibration
    samples = dict(zip(calibration.sources, shares(calibration.samples, calibration.sources), strict=True))
    unknown = ("config", "bits_per_weight", "claimed_bits", "bits_by_part", "quantized_weights", "file_bytes")
    measured = (
        "perplexity",
        "block_errors",
        "tasks",
        "seconds",
        "evaluation_seconds",
        "peak_rss_bytes",
        "layers",
        "blocks",
    )
    row: dict[str, Any] = {
        "schema": 1,
        "model": subject.path,
        "revision": None,
        "method": name,
        "preprocessing": subject.preprocessing,
        "calib": {source: count * calibration.seqlen for source, count in samples.items()},
        "seqlen": calibration.seqlen,
        **dict.fromkeys((*unknown, *measured)),
        "seed": calibration.seed,
        "threads": torch.get_num_threads(),
        "device": subject.device.type,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "version": ptq161.__version__,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "status": "ok",
        "reason": None,
    }
    try:
        for column, value in _columns(made_by, subject, evaluation, on_step):
            row[column] = _finite(value)
    except (Ptq161Error, RuntimeError, MemoryError) as error:  # torch: no memory, no such decomposition, ...
        if made_by is full_precision:
            raise
        row["status"] = "skipped" if isinstance(error, InputError) else "failed"
        row["reason"] = f"{error or type(error).__name__}".splitlines()[0]
    return row


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON cannot write: a model can be ruined that far."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _columns(
    made_by: Contender, subject: Subject, evaluation: Evaluation, on_step: OnStep
) -> Iterator[tuple[str, Any]]:
    machine.reset_peak_rss()
    began = time.monotonic()
    candidate = made_by(subject, on_step)
    seconds = time.monotonic() - began
    quantized = candidate.parts is not None
    yield "seconds", seconds if quantized and not candidate.continued else None
    yield "peak_rss_bytes", machine.recent_peak_rss_bytes()
    yield "config", candidate.config
    yield "bits_per_weight", candidate.bits_per_weight
    yield "claimed_bits", candidate.claimed_bits
    yield "bits_by_part", candidate.parts
    yield "quantized_weights", candidate.weights
    yield "file_bytes", candidate.file_bytes
    yield "layers", candidate.layers
    yield "blocks", candidate.blocks
    began = time.monotonic()
    yield from evaluation(candidate.model.to(subject.device, subject.dtype), on_step)  # type: ignore[arg-type]
    yield "evaluation_seconds", time.monotonic() - began
