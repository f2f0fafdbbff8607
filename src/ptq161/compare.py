"""Methods side by side on one model: the same calibration tokens, the same evaluation tokens, one row each.

A comparison is a folder. `comparison.json` says what it is a comparison of, `results.jsonl` has a row for every method
that is done, `channels.json` is for the report, and `models` has the packed checkpoints. Run again, it makes the rows
that are not there or were not ok.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ptq161
from ptq161 import machine
from ptq161.checkpoint import locked, write_atomically
from ptq161.comparison_inputs import CHANNELS, MODELS, RESULTS, Settings, claim, job, subjects_and_texts
from ptq161.contenders import FULL_PRECISION, Contender, OnStep, Subject, contender, full_precision
from ptq161.data import parse_source, shares
from ptq161.errors import InputError, Ptq161Error
from ptq161.evaluate.channels import channel_magnitudes
from ptq161.evaluate.drift import block_errors, block_outputs
from ptq161.evaluate.perplexity import perplexity

WATCHED_SAMPLES = 4  # calibration samples that channels are measured on, for the report


# Task -> its figures, for a model and its tokenizer; told (requests answered, requests in all).
MeasureTasks = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Callable[[int, int], None]], dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """What every row is measured by. wanted: the original's hidden states on the first window, block by block."""

    texts: Mapping[str, Int64[Tensor, " tokens"]]
    settings: Settings
    measure_tasks: MeasureTasks | None
    wanted: list[Float[Tensor, "1 window hidden"]]

    @property
    def first_window(self) -> Int64[Tensor, " window"]:
        return next(iter(self.texts.values()))[: self.settings.window]

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, on_step: OnStep
    ) -> Iterator[tuple[str, Any]]:
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
                on_window=partial(on_step, "window"),
            )
        yield "perplexity", measured
        if self.measure_tasks is not None:
            yield "tasks", self.measure_tasks(model, tokenizer, partial(on_step, "request"))


def compare(
    model: str,
    out: str | Path,
    settings: Settings,
    *,
    measure_tasks: MeasureTasks | None = None,
    command: str | None = None,
    restart: bool = False,
    on_step: Callable[[str, str, int, int], None] = lambda row, what, done, total: None,
) -> dict[str, Any]:
    """Make every row of a comparison that its folder does not have yet.

    measure_tasks: what `settings.tasks` stands for. command: what to type for it, for the rows. restart: drop what is
    there. on_step: told the row at work, what it is doing, how many steps are done and how many there are.

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
        subjects, texts = subjects_and_texts(model, out / MODELS, settings)
        claim(out, job(subjects, texts, settings), restart=restart)
        evaluation = Evaluation(texts, settings, measure_tasks, [])
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

                row = _row(name, made_by, subject, evaluation, partial(on_step, label)) | {"command": command}
                kept = [other for other in rows if not _same(other, name, subject)]
                write_rows(out, [*kept, row])
    return {"model": model, "out": str(out), "rows": read_rows(out)}


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
    model = candidate.model.to(subject.device, subject.dtype)  # type: ignore[arg-type]
    yield from evaluation(model, subject.tokenizer, on_step)
    yield "evaluation_seconds", time.monotonic() - began
