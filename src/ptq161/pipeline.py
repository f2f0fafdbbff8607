"""The main job around the walk: settings, source, stages, files."""

import shutil
import time
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161 import preflight
from ptq161.checkpoint import WorkFolder, check_disk, check_out
from ptq161.config import DEFAULT_PRESET, CalibrationConfig, Distill, Head, QuantConfig, preset_named, unknown
from ptq161.data import SELF, calibration_and_fresh_tokens, parse_source
from ptq161.dense import DenseModel
from ptq161.errors import InputError, Ptq161Error
from ptq161.hf import save_packed
from ptq161.inspection import inspect, predict
from ptq161.machine import peak_rss_bytes, pick_device
from ptq161.methods import BASELINES, METHODS
from ptq161.records import job, run_record
from ptq161.sources import open_dense
from ptq161.space import Space
from ptq161.tuning import check_required, distill, fresh_samples, learned_samples
from ptq161.vocabulary import pack_vocabulary, vocabulary_specs
from ptq161.walk import OnProgress, Prepared, Progress, allot, asks_for_harms, prepare, walk

__all__ = ["Progress", "plan", "quantize", "settings"]

# Of what `inspect` reports, what `quantize` reports, too.
SIZES = (
    "bits_per_weight",
    "paper_bits",
    "salient_ratio",
    "file_bytes",
    "quantized_weights",
    "vocabulary_bits",
    "embedding_bytes",
    "head_bytes",
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quantize(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    preset: str = DEFAULT_PRESET,
    calib: str | Sequence[str] | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    blocks: tuple[int, int] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    offload: str | Path | None = None,
    on_progress: OnProgress = lambda progress: None,
    **overrides: Any,
) -> dict[str, Any]:
    """Quantize a model into a packed checkpoint folder, continuing an interrupted run of the same settings.

    model: hub name, folder, `.gguf` file, or a model in memory (then give its tokenizer). calib: SOURCE or several.
    blocks: half-open range of decoder blocks to quantize, the others stay dense. dtype: what the tensors that are not
    quantized are saved in; `auto` keeps 16-bit ones and saves float32 and GGUF sources in bfloat16. offload: a folder
    for the streams of hidden states, instead of memory. overrides: any field of QuantConfig, such as bits or epochs.

    Returns the JSON of `ptq161 quantize --json`. Raises InputError before anything is written, Ptq161Error later, with
    finished blocks kept beside OUT.
    """
    began = time.monotonic()
    config, calibration = settings(preset, calib, samples, seqlen, seed, overrides)
    out, torch_device = Path(out), pick_device(device)
    work = WorkFolder(out)
    work.complete()
    check_out(out, overwrite=overwrite)
    source, tokenizer = _source(model, tokenizer)
    save_dtype = _save_dtype(dtype, source.dtype)
    # Only `self` needs the model itself to be read whole; of any other text just token ids are checked against it.
    reader = source.whole() if SELF in map(_source_name, calibration.sources) else source.skeleton
    tokens, fresh = calibration_and_fresh_tokens(calibration, fresh_samples(config, calibration), tokenizer, reader)
    del reader
    learned = learned_samples(config, tokens, fresh)
    prepared = _with_head(prepare(source, tokens, config, blocks), config)
    predicted = predict(source.skeleton, prepared.layout, save_dtype)
    space = Space(None if offload is None else Path(offload))
    _check_disks(out, space, predicted["file_bytes"], prepared, tokens.shape, config)
    check_required(prepared, config, learned, torch_device)
    identity = job(prepared, config, tokens, fresh, save_dtype, torch_device)
    with work.open(identity, restart=restart):
        try:
            if asks_for_harms(config):
                layout = work.load_layout()
                if layout is None:
                    scratch = Space(space.folder or work.path)
                    layout = allot(prepared, tokens, config, torch_device, scratch, on_progress).layout
                    work.save_layout(layout)
                prepared = _with_head(replace(prepared, layout=layout), config)
            for block in walk(prepared, tokens, config, torch_device, work.load_streams(space), on_progress, space):
                work.save_block(block.index, block.packed, block.record)
                if config.distill is not Distill.OFF and block.latents:
                    work.save_latents(block.index, block.latents)
                work.save_streams(block.streams)
                del block  # the next one comes without this one's latents
            packed, records = work.load_blocks(prepared.first, prepared.last)
            tuned = distill(work, prepared, learned, config, torch_device, on_progress)
            distillation = None if tuned is None else tuned.record | {"fresh": learned is fresh}
            name = str(model.config.name_or_path) if isinstance(model, PreTrainedModel) else str(model)
            shutil.rmtree(work.result, ignore_errors=True)
            vocabulary = pack_vocabulary(source.weights, prepared.layout.vocabulary)
            save_packed(
                work.result,
                source.skeleton,
                prepared.layout,
                ChainMap(vocabulary, dict(tuned.packed) if tuned else {}, packed),  # type: ignore[arg-type]
                weights=source.weights if tuned is None else ChainMap(dict(tuned.norms), source.weights),  # type: ignore[arg-type]
                dtype=save_dtype,
                run=run_record(name, config, calibration, tokens, prepared, records, distillation),
                tokenizer=tokenizer,
            )
            work.publish()
        except (OSError, SafetensorError) as error:
            raise Ptq161Error(
                f"cannot write below {work.path}: {error}; finished blocks are kept, the same command continues"
            ) from error
    sizes = inspect(out)
    return {
        **{key: sizes[key] for key in SIZES},
        "dense_linears": prepared.dense_linears,
        "seconds": time.monotonic() - began,
        "peak_rss_bytes": peak_rss_bytes(),
        "blocks": records,
        "distillation": distillation,
        "weights_in_memory": source.resident,
    }


def _check_disks(
    out: Path, space: Space, file_bytes: int, prepared: Prepared, shape: Sequence[int], config: QuantConfig
) -> None:
    offloaded = space.folder is not None
    check_disk(out, file_bytes + preflight.work_bytes(prepared, shape, config, offloaded=offloaded))
    if space.folder is not None:
        if not space.folder.is_dir():
            raise InputError(f"--offload {space.folder}: expected a folder that exists, on a disk with room")
        check_disk(space.folder / "stream", preflight.offload_bytes(prepared, shape, config))


def plan(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    preset: str = DEFAULT_PRESET,
    calib: str | Sequence[str] | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int | None = None,
    blocks: tuple[int, int] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload: str | Path | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """What `quantize` with the same arguments will take and give; reads, but writes nothing.

    Returns the JSON of `ptq161 quantize --dry-run --json`: what cannot be known beforehand is None.
    """
    config, calibration = settings(preset, calib, samples, seqlen, seed, overrides)
    pick_device(device)
    source, _ = _source(model, tokenizer)
    save_dtype = _save_dtype(dtype, source.dtype)
    tokens = torch.zeros(1, min(calibration.seqlen, 8), dtype=torch.int64)
    prepared = _with_head(prepare(source, tokens, config, blocks), config)
    predicted = predict(source.skeleton, prepared.layout, save_dtype)
    shape, offloaded = (calibration.samples, calibration.seqlen), offload is not None
    disk = predicted["file_bytes"] + preflight.work_bytes(prepared, shape, config, offloaded=offloaded)
    return {
        **{key: predicted[key] for key in SIZES},
        "dense_linears": prepared.dense_linears,
        "seconds": None,
        "peak_rss_bytes": None,
        "blocks": None,
        "distillation": None,
        "weights_in_memory": source.resident,
        "peak_memory_bytes": preflight.memory_bytes(prepared, shape, config, offloaded=offloaded),
        "disk_bytes": disk,
        "offload_bytes": preflight.offload_bytes(prepared, shape, config) if offloaded else None,
        "flops": preflight.flops(prepared, shape, config),
    }


def settings(
    preset: str,
    calib: str | Sequence[str] | None,
    samples: int | None,
    seqlen: int | None,
    seed: int | None,
    overrides: Mapping[str, Any],
) -> tuple[QuantConfig, CalibrationConfig]:
    """A preset with what the caller gave on top. Giving bits drops a preset's salient ratio, and the other way round.

    Raises InputError for unknown names and values out of range.
    """
    chosen = preset_named(preset)
    values = dict(overrides)
    if values.get("bits") is not None:
        values.setdefault("salient_ratio", None)
    elif values.get("salient_ratio") is not None:
        values.setdefault("bits", None)
    if seed is not None:
        values["seed"] = seed
    config = chosen.quant.replaced(values)
    if config.method in BASELINES:
        raise InputError(
            f"method {config.method} has no packed format, it is there to compare with; give {' or '.join(METHODS)}"
        )
    if config.method not in METHODS:
        raise InputError(unknown("method", config.method, METHODS))
    if config.distill is Distill.REQUIRED and config.method != "mixed":
        raise InputError(
            f"distill={config.distill} with method={config.method}: only the codes of method mixed can be learned "
            "further; give --set distill=off"
        )
    given = {"sources": calib, "samples": samples, "seqlen": seqlen, "seed": seed}
    calibration = chosen.calibration.replaced({key: value for key, value in given.items() if value is not None})
    return config, calibration


def _source(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[DenseModel, PreTrainedTokenizerBase]:
    if not isinstance(model, PreTrainedModel):
        return open_dense(model)
    if tokenizer is None:
        raise InputError("a model in memory comes without its tokenizer: give tokenizer=...")
    return DenseModel.of(model), tokenizer


def _with_head(prepared: Prepared, config: QuantConfig) -> Prepared:
    if config.head is not Head.INT8:
        return prepared
    return replace(prepared, layout=replace(prepared.layout, vocabulary=vocabulary_specs(prepared.model.skeleton)))


def _source_name(source: str) -> str:
    return parse_source(source).name


def _save_dtype(name: str, source: torch.dtype) -> torch.dtype:
    if name == "auto":
        return source if source in (torch.bfloat16, torch.float16) else torch.bfloat16
    if name not in DTYPES:
        raise InputError(unknown("dtype", name, ["auto", *DTYPES]))
    return DTYPES[name]
