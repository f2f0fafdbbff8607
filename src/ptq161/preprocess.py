"""Quantization preprocessing (section 3.4): a full-precision model that quantizes better than the one it comes from.

The model is quantized once, adapters are trained to restore it, and the two are merged into one dense model. That one
is not for use as it is: it is to be quantized again, by any method.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Int64
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import ptq161
from ptq161 import ranks
from ptq161.adapters import target_linears
from ptq161.before_after import SALIENT_MAPS, Perplexities, salient_weights
from ptq161.checkpoint import WorkFolder, check_disk, check_out
from ptq161.config import CalibrationConfig, Loss, PreprocessConfig, Start, unknown
from ptq161.data import SELF, calibration_and_fresh_tokens, calibration_tokens, evaluation_tokens
from ptq161.dense import DenseModel
from ptq161.discovery import block_linears
from ptq161.errors import InputError, Ptq161Error
from ptq161.first_quantization import (
    Recipe,
    check_quantized,
    column_groups,
    preset_recipe,
    quantize_by,
    recorded_recipe,
)
from ptq161.folder import CHECKSUMS, RUN, file_checksum, write_json
from ptq161.hf import load
from ptq161.machine import peak_rss_bytes, pick_device
from ptq161.pipeline import DTYPES
from ptq161.records import fingerprint
from ptq161.restoration import Restoration, passes_of_a_rank
from ptq161.sources import open_dense
from ptq161.walk import OnProgress, Progress


@dataclass(frozen=True)
class _Task:
    """One run of the stage, checked: what its steps share."""

    source: DenseModel
    tokenizer: PreTrainedTokenizerBase
    config: PreprocessConfig
    targets: list[str]
    samples: Int64[Tensor, "samples seq"]
    quantized: Path | None  # None: to be made by the recipe
    recipe: Recipe | None  # None: nothing is left to be quantized
    held_out: Mapping[str, Int64[Tensor, " tokens"]]
    ppl_seqlen: int
    max_windows: int | None
    device: torch.device
    dtype: torch.dtype  # of the result
    on_progress: OnProgress


def preprocess(
    model: str | Path,
    out: str | Path,
    *,
    text: Sequence[str],
    quantized: str | Path | None = None,
    preset: str = "paper",
    calib: Sequence[str] | None = None,
    ppl: Sequence[str] = (),
    ppl_seqlen: int = 2048,
    max_windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    on_progress: OnProgress = lambda progress: None,
    **overrides: Any,
) -> dict[str, Any]:
    """Write the preprocessed model into the folder `out`, continuing an interrupted run of the same settings.

    text: SOURCEs that the adapters learn from. quantized: a packed checkpoint of the model; without, one is made with
    `preset`, calibrated on `calib` (default: `text`). ppl: SOURCEs of held-out text; with any, the result is also
    quantized, as the first time, and all four models are measured. dtype: of the result; `auto` keeps the source's.
    overrides: fields of PreprocessConfig. Of several ranks each calls this with the same arguments.

    Returns the JSON of `ptq161 preprocess --json`. Raises InputError before anything is written, Ptq161Error later,
    with what was done kept beside OUT.
    """
    began = time.monotonic()
    out = Path(out)
    work = WorkFolder(out)
    with ranks.first_goes_first():
        config = PreprocessConfig().replaced(overrides)
        passes_of_a_rank(config)
        if ranks.first():
            work.complete()
            check_out(out, overwrite=overwrite)
        source, tokenizer = open_dense(model)
        if quantized is not None:
            check_quantized(Path(quantized), source)
        task = _Task(
            source=source,
            tokenizer=tokenizer,
            config=config,
            targets=target_linears(_linears(source), config.targets),
            samples=_samples(text, config, tokenizer, source),
            quantized=None if quantized is None else Path(quantized),
            recipe=_recipe(quantized, preset, list(calib or text), again=bool(ppl)),
            held_out={name: evaluation_tokens(name, tokenizer) for name in ppl},
            ppl_seqlen=ppl_seqlen,
            max_windows=max_windows,
            device=pick_device(device),
            dtype=_dtype(dtype, source),
            on_progress=on_progress,
        )
        if task.recipe is not None and SELF not in task.recipe[1].sources:
            calibration_tokens(task.recipe[1], tokenizer, source.skeleton)  # refuses now, and not in two hours
        check_disk(out, _work_bytes(task))
    with work.open(ranks.from_first(lambda: _job(task)), restart=restart):
        try:
            record = {"model": str(model), "text": list(text), **_run(task, work)}
            record["timing"]["seconds"] = time.monotonic() - began
            maps = record.pop("maps")
            ranks.from_first(lambda: _publish(work, record, maps))
        except (OSError, SafetensorError) as error:
            raise Ptq161Error(
                f"cannot write below {work.path}: {error}; what was done is kept, the same command continues"
            ) from error
    timing = record.pop("timing")
    return {**record, **timing, "peak_rss_bytes": peak_rss_bytes()}


def _recipe(quantized: str | Path | None, preset: str, calib: Sequence[str], *, again: bool) -> Recipe | None:
    """How to quantize: by a preset, or as a packed checkpoint was; None where nothing is to be quantized."""
    if quantized is None:
        return preset_recipe(preset, calib)
    return recorded_recipe(Path(quantized)) if again else None


def _publish(work: WorkFolder, record: Mapping[str, Any], maps: Sequence[Mapping[str, Any]]) -> None:
    """Write the records beside the model and put it at OUT."""
    (work.result / SALIENT_MAPS).write_text(json.dumps(maps))
    write_json(work.result / RUN, record)
    work.publish()


def _run(task: _Task, work: WorkFolder) -> dict[str, Any]:
    """Quantize once, train, merge into `work.result`, and measure if there is text for it; returns the record."""

    def quantized(model: PreTrainedModel, folder: Path) -> Path:
        assert task.recipe is not None
        quantize_by(task.recipe, model, task.tokenizer, folder, task.device, task.on_progress)
        return folder

    def dense(folder: Path) -> PreTrainedModel:
        return load(folder, dtype=torch.float32, mode="dense")

    once = task.quantized or quantized(task.source.whole(), work.path / "once")
    measured = Perplexities(
        work.path / "perplexities.json", task.held_out, task.ppl_seqlen, task.max_windows, task.device
    )
    measured.add("original", task.source.whole)
    measured.add("quantized", lambda: dense(once))
    began = time.monotonic()
    merged, losses = _restore(task, once, work.path / "adapters")
    trained = time.monotonic() - began

    def spread_and_maps() -> tuple[dict[str, float], list[dict[str, Any]]]:
        weights = {"original": task.source.weights, "quantized": dense(once).state_dict()}
        return salient_weights(weights | {"preprocessed": merged.state_dict()}, task.targets)

    spread, maps = ranks.from_first(spread_and_maps)
    merged.to(task.dtype)  # type: ignore[arg-type]
    ranks.from_first(lambda: _save(merged, task.tokenizer, work.result))
    if task.held_out:
        again = quantized(merged, work.path / "again")
        measured.add("preprocessed", lambda: merged)
        measured.add("preprocessed_quantized", lambda: dense(again))
    config = task.config
    return {
        "config": asdict(config),
        "quantization": None if task.recipe is None else [asdict(part) for part in task.recipe],
        "targets": len(task.targets),
        "tokens": config.steps * config.batch_size * config.accumulation * config.seqlen,
        "distinct_tokens": task.samples.numel(),
        "losses": losses,
        "perplexity": measured.by_source() or None,
        "concentration": spread,
        "maps": maps,
        "threads": torch.get_num_threads(),
        "ranks": ranks.count(),
        "versions": {
            "ptq161": ptq161.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "timing": {"training_seconds": trained},
    }


def _restore(task: _Task, once: Path, folder: Path) -> tuple[PreTrainedModel, list[float]]:
    """The merged model, float32 on the CPU, and the mean loss of each tenth of the steps."""
    began = time.monotonic()

    def on_step(step: int, steps: int, loss: float) -> None:
        task.on_progress(Progress(0, 0, 0, "restore", step, steps, loss, time.monotonic() - began))

    config = task.config
    start = task.source.whole()
    if config.start is Start.QUANTIZED:
        start.load_state_dict(load(once, dtype=torch.float32, mode="dense").state_dict(), assign=True)
        start.tie_weights()
    start.float().requires_grad_(False).to(task.device)
    teacher = task.source.whole().float().to(task.device) if config.loss is Loss.LOGITS else None
    grids = column_groups(once, task.targets, task.device) if config.through else {}
    run = Restoration(start, task.targets, config, teacher=teacher, grids=grids)
    losses = run.train(task.samples, folder, on_step)
    tenth = -(-len(losses) // 10)
    parts = [losses[at : at + tenth] for at in range(0, len(losses), tenth)]
    return run.merge().cpu(), [sum(part) / len(part) for part in parts]


def _samples(
    text: Sequence[str], config: PreprocessConfig, tokenizer: PreTrainedTokenizerBase, source: DenseModel
) -> Int64[Tensor, "samples seq"]:
    """Windows for every step, or as many as the text has."""
    if SELF in text:
        raise InputError(
            "the adapters learn from text, and 'self' has none: expected a file, wikitext2, c4 or redpajama"
        )
    one_each = CalibrationConfig(tuple(text), len(text), config.seqlen, config.seed)
    more = max(0, config.steps * config.batch_size * config.accumulation - len(text))
    return torch.cat(calibration_and_fresh_tokens(one_each, more, tokenizer, source.skeleton))


def _linears(source: DenseModel) -> list[str]:
    """Full names of the linears of all blocks. Raises UnsupportedModel."""
    return [
        f"{source.prefix}.{index}.{name}"
        for index, block in enumerate(source.blocks)
        for name in block_linears(source.skeleton, index, block)
    ]


def _dtype(name: str, source: DenseModel) -> torch.dtype:
    if name != "auto" and name not in DTYPES:
        raise InputError(unknown("dtype", name, ["auto", *DTYPES]))
    return DTYPES.get(name, source.dtype)


def _work_bytes(task: _Task) -> int:
    """Estimated disk for the result, two packed models, and three checkpoints of adapters with two moments each."""
    weights = sum(parameter.numel() for parameter in task.source.skeleton.parameters())
    shapes = [task.source.skeleton.get_parameter(f"{name}.weight").shape for name in task.targets]
    adapters = task.config.rank * sum(rows + cols for rows, cols in shapes)
    return weights * (task.dtype.itemsize + 2 * 2) + 3 * 3 * 4 * adapters


def _job(task: _Task) -> dict[str, Any]:
    """Everything that decides about the bytes of the result, or about what is measured."""
    quantization = {} if task.recipe is None else {"quantize": asdict(task.recipe[0]), "calib": asdict(task.recipe[1])}
    return {
        "model": fingerprint(task.source.weights),
        "preprocess": asdict(task.config),
        "text": fingerprint({"samples": task.samples, **task.held_out}),
        "quantized": None if task.quantized is None else file_checksum(task.quantized / CHECKSUMS),
        **quantization,
        "perplexity": {"sources": list(task.held_out), "seqlen": task.ppl_seqlen, "max_windows": task.max_windows},
        "dtype": str(task.dtype).removeprefix("torch."),
        "device": task.device.type,
        "threads": torch.get_num_threads(),
        "ranks": ranks.count(),
        "ptq161": ptq161.__version__,
    }


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a dense model; its generation settings as they are, which save_pretrained may refuse as inconsistent."""
    shutil.rmtree(folder, ignore_errors=True)
    generation = model.generation_config
    if generation is not None:
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    if generation is not None:
        model.generation_config = generation
        generation.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
