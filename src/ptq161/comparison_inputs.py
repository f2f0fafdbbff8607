"""What all rows of a comparison have in common: model, calibration and evaluation text; refused if it changed."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ptq161.checkpoint import differences, write_atomically
from ptq161.config import CalibrationConfig
from ptq161.contenders import Subject
from ptq161.data import SELF, calibration_tokens, evaluation_tokens, parse_source
from ptq161.errors import InputError
from ptq161.records import fingerprint
from ptq161.sources import open_dense

RESULTS, JOB, CHANNELS, MODELS = "results.jsonl", "comparison.json", "channels.json", "models"


@dataclass(frozen=True)
class Settings:
    """What a comparison is made on. calibration: of every method. windows: None for all of each text's.

    ppl: the texts to be predicted, as typed. tasks: which, on how much of which data, for the record; None for none.
    preprocessed: a second model to give every method, besides the original.
    """

    methods: tuple[str, ...]
    calibration: CalibrationConfig
    ppl: tuple[str, ...]
    window: int
    max_windows: int | None
    tasks: Mapping[str, Any] | None
    preprocessed: str | None
    device: torch.device
    dtype: torch.dtype


def subjects_and_texts(
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
            Subject(path, preprocessing, dense, tokenizer, calibration, samples, settings.device, settings.dtype, kept)
        )
    if any(not tokens.equal(read[-1][name]) for name, tokens in read[0].items()):
        raise InputError(f"{settings.preprocessed} and {model} cut text into different tokens: expected one tokenizer")
    return subjects, {source: read[0][source] for source in settings.ppl}


def job(
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
        "tasks": settings.tasks,
        "window": settings.window,
        "max_windows": settings.max_windows,
        "device": settings.device.type,
        "dtype": str(settings.dtype).removeprefix("torch."),
    }


def claim(out: Path, job: Mapping[str, Any], *, restart: bool) -> None:
    """Start a comparison in a folder, or make sure that the one in there is the same. Raises InputError.

    Which model is the preprocessed one is settled by the first call that names one; calls before and after need not.
    """
    path = out / JOB
    if restart and path.exists():
        shutil.rmtree(out / MODELS, ignore_errors=True)
        for name in (RESULTS, CHANNELS, JOB):
            (out / name).unlink(missing_ok=True)
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        job = {**job, "preprocessed": job["preprocessed"] or held["preprocessed"]}
        if different := differences({**held, "preprocessed": held["preprocessed"] or job["preprocessed"]}, job):
            raise InputError(
                f"{out} holds a comparison on other ground ({different}); repeat its settings to continue it, choose "
                "another folder, or give --restart to drop it"
            )
    elif {entry.name for entry in out.iterdir()} - {"lock", f"{JOB}.new"}:
        raise InputError(f"{out} is no folder of a comparison and not empty: choose another one")
    write_atomically(path, lambda target: target.write_text(json.dumps(job, indent=1), encoding="utf-8"))
