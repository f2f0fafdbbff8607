"""The main job around the walk: settings, source, stages, files."""

import shutil
import time
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161 import preflight, ranks
from ptq161.blockwise import divided_layout, quantize_blocks
from ptq161.causal import fast_attention
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
from ptq161.tuning import Tuned, check_required, distill, fresh_samples, learned_text
from ptq161.vocabulary import pack_vocabulary, vocabulary_specs
from ptq161.walk import OnProgress, Prepared, Progress, prepare

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
    Of several ranks each calls this with the same arguments, and OUT lies on a disk that all of them see.

    Returns the JSON of `ptq161 quantize --json`. Raises InputError before anything is written, Ptq161Error later, with
    finished blocks kept beside OUT.
    """
    began = time.monotonic()
    with ranks.first_goes_first():
        config, calibration = settings(preset, calib, samples, seqlen, seed, overrides)
        _check_batches(config, calibration)
        out, torch_device = Path(out), pick_device(device)
        work = WorkFolder(out)
        if ranks.first():
            work.complete()
            check_out(out, overwrite=overwrite)
        source, tokenizer = _source(model, tokenizer)
        save_dtype = _save_dtype(dtype, source.dtype)
    tokens, fresh = ranks.from_first(partial(_tokens, config, calibration, tokenizer, source))
    with ranks.first_goes_first(), fast_attention(source.skeleton, torch_device):
        text = learned_text(config, tokens, fresh)
        prepared = _with_head(prepare(source, tokens, config, blocks), config)
        predicted = predict(source.skeleton, prepared.layout, save_dtype)
        space = Space(None if offload is None else Path(offload))
        _check_disks(out, space, predicted["file_bytes"], prepared, tokens.shape, config)
        check_required(prepared, config, text, torch_device)
    identity = ranks.from_first(lambda: job(prepared, config, tokens, fresh, save_dtype, torch_device))
    with work.open(identity, restart=restart), fast_attention(source.skeleton, torch_device):
        try:
            layout = divided_layout(work, prepared, tokens, config, torch_device, space, on_progress)
            prepared = _with_head(replace(prepared, layout=layout), config)
            quantize_blocks(work, prepared, tokens, config, torch_device, space, on_progress)
            packed, records = work.load_blocks(prepared.first, prepared.last)
            tuned = distill(work, prepared, text, config, torch_device, on_progress)
            distillation = None if tuned is None else tuned.record
            name = str(model.config.name_or_path) if isinstance(model, PreTrainedModel) else str(model)
            run = run_record(name, config, calibration, tokens, prepared, records, distillation)
            ranks.from_first(partial(_publish, work, prepared, packed, tuned, save_dtype, run, tokenizer))
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


def _publish(
    work: WorkFolder,
    prepared: Prepared,
    packed: Mapping[str, Tensor],
    tuned: Tuned | None,
    dtype: torch.dtype,
    run: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the packed checkpoint of finished blocks, what was tuned in place of theirs, and put it at OUT."""
    weights = prepared.model.weights
    vocabulary = pack_vocabulary(weights, prepared.layout.vocabulary)
    shutil.rmtree(work.result, ignore_errors=True)
    save_packed(
        work.result,
        prepared.model.skeleton,
        prepared.layout,
        ChainMap(vocabulary, dict(tuned.packed) if tuned else {}, packed),  # type: ignore[arg-type]
        weights=weights if tuned is None else ChainMap(dict(tuned.norms), weights),  # type: ignore[arg-type]
        dtype=dtype,
        run=run,
        tokenizer=tokenizer,
    )
    work.publish()


def _tokens(
    config: QuantConfig, calibration: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, source: DenseModel
) -> tuple[Int64[Tensor, "samples seq"], Int64[Tensor, "fresh seq"]]:
    """Calibration samples and fresh ones.

    Only `self` needs the model itself to be read whole; of any other text just token ids are checked against it.
    """
    reader = source.whole() if SELF in map(_source_name, calibration.sources) else source.skeleton
    return calibration_and_fresh_tokens(calibration, fresh_samples(config, calibration), tokenizer, reader)


def _check_batches(config: QuantConfig, calibration: CalibrationConfig) -> None:
    """Raises InputError if ranks could not have equal parts of a step, or any samples at all."""
    number = ranks.count()
    if calibration.samples < number:
        raise InputError(f"samples={calibration.samples} for {number} ranks: expected one each, at least")
    names = ["batch_size"] if config.distill is Distill.OFF else ["batch_size", "distill_batch_size"]
    for name in names:
        size = getattr(config, name)
        if size > 1 and size % number:
            raise InputError(
                f"{name}={size} cannot be divided among {number} ranks: expected a multiple of {number}, or 1 for "
                f"steps that are not divided; give --set {name}={-(-size // number) * number}"
            )


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
    """What `quantize` with the same arguments will take and give; reads, but writes nothing. Memory is that of a rank.

    Returns the JSON of `ptq161 quantize --dry-run --json`: what cannot be known beforehand is None.
    """
    config, calibration = settings(preset, calib, samples, seqlen, seed, overrides)
    torch_device = pick_device(device)
    source, _ = _source(model, tokenizer)
    save_dtype = _save_dtype(dtype, source.dtype)
    tokens = torch.zeros(1, min(calibration.seqlen, 8), dtype=torch.int64)
    prepared = _with_head(prepare(source, tokens, config, blocks), config)
    predicted = predict(source.skeleton, prepared.layout, save_dtype)
    _check_batches(config, calibration)
    shape, offloaded = (calibration.samples, calibration.seqlen), offload is not None
    own = (-(-calibration.samples // ranks.count()), calibration.seqlen)
    disk = predicted["file_bytes"] + preflight.work_bytes(prepared, shape, config, offloaded=offloaded)
    return {
        **{key: predicted[key] for key in SIZES},
        "dense_linears": prepared.dense_linears,
        "seconds": None,
        "peak_rss_bytes": None,
        "blocks": None,
        "distillation": None,
        "weights_in_memory": source.resident,
        "peak_memory_bytes": preflight.memory_bytes(prepared, own, config, torch_device, offloaded=offloaded),
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
