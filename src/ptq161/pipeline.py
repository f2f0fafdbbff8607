"""The main job around the walk: settings, files, resuming, the packed checkpoint; and what it will take beforehand."""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Int64
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ptq161
from ptq161.blocks import float32_vectors
from ptq161.checkpoint import WorkFolder, check_disk, check_out
from ptq161.config import DEFAULT_PRESET, CalibrationConfig, Distill, Head, QuantConfig, preset_named, unknown
from ptq161.data import calibration_and_fresh_tokens
from ptq161.distill import held_out_count, step_count, tune
from ptq161.errors import InputError, Ptq161Error
from ptq161.folder import tensor_checksum
from ptq161.hf import save_packed
from ptq161.inspection import inspect, predict
from ptq161.layout import PackedLinearSpec
from ptq161.machine import free_memory_bytes, peak_rss_bytes, pick_device
from ptq161.methods import BASELINES, METHODS
from ptq161.sources import DenseModel, open_dense
from ptq161.student import memory_bytes, student_of
from ptq161.vocabulary import pack_vocabulary, vocabulary_specs
from ptq161.walk import OnProgress, Prepared, Progress, packed_tensors, prepare, walk

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
    on_progress: OnProgress = lambda progress: None,
    **overrides: Any,
) -> dict[str, Any]:
    """Quantize a model into a packed checkpoint folder, continuing an interrupted run of the same settings.

    model: hub name, folder, `.gguf` file, or a model in memory (then give its tokenizer). calib: SOURCE or several.
    blocks: half-open range of decoder blocks to quantize, the others stay dense. dtype: what the tensors that are not
    quantized are saved in; `auto` keeps 16-bit ones and saves float32 and GGUF sources in bfloat16. overrides: any
    field of QuantConfig, e.g. bits=1.61 or epochs=4.

    Returns the JSON of `ptq161 quantize --json`. Raises InputError before anything is written, Ptq161Error later, with
    finished blocks kept beside OUT.
    """
    began = time.monotonic()
    config, calibration = settings(preset, calib, samples, seqlen, seed, overrides)
    out, torch_device = Path(out), pick_device(device)
    check_out(out, overwrite=overwrite)
    source = _source(model, tokenizer)
    vocabulary = _vocabulary(source.model, config)
    save_dtype = _save_dtype(dtype, source.dtype)
    tokens, fresh = calibration_and_fresh_tokens(
        calibration, _fresh_samples(config, calibration), source.tokenizer, source.model
    )
    learned = _learned_samples(config, tokens, fresh)
    identity = _fingerprint(source.model.state_dict())
    prepared = _with_vocabulary(prepare(source.model, tokens, config, blocks, torch_device), vocabulary)
    predicted = predict(source.model, prepared.layout, save_dtype)
    check_disk(out, predicted["file_bytes"] + _work_bytes(prepared, tokens.shape, config))
    if config.distill is Distill.REQUIRED and (obstacle := _obstacle(prepared, config, learned, torch_device)):
        raise InputError(f"distillation {obstacle}; give what it needs, or --set distill=auto")
    job = {
        "model": identity,
        "config": asdict(config),
        "calibration": _fingerprint({"tokens": tokens, "fresh": fresh}),
        "blocks": [prepared.first, prepared.last],
        "dtype": str(save_dtype).removeprefix("torch."),
        "device": torch_device.type,
        "threads": torch.get_num_threads(),
        "ptq161": ptq161.__version__,
    }
    work = WorkFolder(out)
    with work.open(job, restart=restart):
        try:
            for block in walk(prepared, tokens, config, torch_device, work.load_streams(), on_progress):
                work.save_block(block.index, block.packed, block.record)
                if config.distill is not Distill.OFF and block.latents:
                    work.save_latents(block.index, block.latents)
                work.save_streams(block.streams)
            packed, records = work.load_blocks(prepared.first, prepared.last)
            with float32_vectors(source.model):
                distillation = _distill(work, prepared, packed, learned, config, torch_device, on_progress)
                if distillation is not None:
                    distillation["fresh"] = learned is fresh
                run = _run_record(config, calibration, tokens, prepared, records, distillation, model)
                save_packed(
                    work.result,
                    source.model,
                    prepared.layout,
                    packed | pack_vocabulary(source.model, prepared.layout.vocabulary),
                    dtype=save_dtype,
                    run=run,
                    tokenizer=source.tokenizer,
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
    }


def _distill(
    work: WorkFolder,
    prepared: Prepared,
    packed: dict[str, Tensor],
    samples: Int64[Tensor, "samples seq"],
    config: QuantConfig,
    device: torch.device,
    on_progress: OnProgress,
) -> dict[str, Any] | None:
    """Tune the whole model after its blocks: replaces `packed` and the model's norm weights by what was learned.

    Returns the JSON record; None where it is off, its reason under `skipped` where it does not fit. Raises Ptq161Error
    in that case if it is required.
    """
    if config.distill is Distill.OFF:
        return None
    model = prepared.model
    if obstacle := _obstacle(prepared, config, samples, device):
        if config.distill is Distill.REQUIRED:
            raise Ptq161Error(f"distillation {obstacle}; finished blocks are kept, the same command continues")
        return {"skipped": obstacle}
    began = time.monotonic()

    def on_step(step: int, steps: int, loss: float) -> None:
        seconds = time.monotonic() - began
        on_progress(Progress(prepared.last, prepared.first, prepared.last, "distill", step, steps, loss, seconds))

    home = next(model.parameters()).device
    model.to(device)  # type: ignore[arg-type]
    latents = {
        name: w.to(device) for name, w in work.load_latents(prepared.layout, prepared.first, prepared.last).items()
    }
    student = student_of(model, latents, _recomputed_blocks(prepared, config, samples, device))
    record = tune(model, student, samples.to(device), config, work.load_distillation(), on_step, work.save_distillation)
    model.to(home)  # type: ignore[arg-type]
    if record["kept"]:
        packed |= packed_tensors({name: weight.quantized() for name, weight in latents.items()}, prepared.layout)
        for name, norm in student.norms.items():
            model.get_parameter(name).data.copy_(norm.detach())
    return record | {"seconds": time.monotonic() - began}


def _learned_samples(
    config: QuantConfig, tokens: Int64[Tensor, "samples seq"], fresh: Int64[Tensor, "fresh seq"]
) -> Int64[Tensor, "learned seq"]:
    """What distillation learns from: fresh samples, or the calibration samples again where the text has no more."""
    enough = len(fresh) - held_out_count(len(fresh)) >= config.distill_batch_size
    return fresh if config.distill_fresh and enough else tokens


def _obstacle(prepared: Prepared, config: QuantConfig, samples: Tensor, device: torch.device) -> str | None:
    """Why distillation cannot run, if it cannot: a method that learns no codes, too little text or memory."""
    if config.method != "mixed":
        return f"needs codes that are learned, and those of method {config.method} are not"
    if step_count(len(samples) - held_out_count(len(samples)), samples.shape[1], config) < 1:
        return (
            f"needs {config.distill_batch_size} samples besides a held-out one, and distill_tokens for them; there are "
            f"{len(samples)} of {samples.shape[1]} tokens, and distill_tokens={config.distill_tokens}"
        )
    weights, seqlen = prepared.layout.quantized_weights, samples.shape[1]
    needed = memory_bytes(prepared.model, weights, seqlen, config, recomputed=True)
    available = free_memory_bytes(device)
    if available is None or needed <= available:
        return None
    return f"needs about {needed / 1e9:.1f} GB more memory, {available / 1e9:.1f} GB are free"


def _recomputed_blocks(
    prepared: Prepared, config: QuantConfig, samples: Tensor, device: torch.device
) -> tuple[str, ...]:
    """The blocks that distillation computes twice: none where memory suffices, which changes time and nothing else."""
    available = free_memory_bytes(device)
    needed = memory_bytes(prepared.model, prepared.layout.quantized_weights, samples.shape[1], config)
    if available is None or needed <= available:
        return ()
    return tuple(f"{prepared.prefix}.{index}" for index in range(len(prepared.blocks)))


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
    **overrides: Any,
) -> dict[str, Any]:
    """What `quantize` with the same arguments will take and give; reads, but writes nothing.

    Returns the JSON of `ptq161 quantize --dry-run --json`: what cannot be known beforehand is None.
    """
    config, calibration = settings(preset, calib, samples, seqlen, seed, overrides)
    torch_device = pick_device(device)
    source = _source(model, tokenizer)
    vocabulary = _vocabulary(source.model, config)
    save_dtype = _save_dtype(dtype, source.dtype)
    tokens = torch.zeros(1, min(calibration.seqlen, 8), dtype=torch.int64)
    prepared = prepare(source.model, tokens, config, blocks, torch_device, calibrated=False)
    prepared = _with_vocabulary(prepared, vocabulary)
    predicted = predict(source.model, prepared.layout, save_dtype)
    shape = torch.Size((calibration.samples, calibration.seqlen))
    return {
        **{key: predicted[key] for key in SIZES},
        "dense_linears": prepared.dense_linears,
        "seconds": None,
        "peak_rss_bytes": None,
        "blocks": None,
        "distillation": None,
        "peak_memory_bytes": _memory_bytes(prepared, shape, config),
        "disk_bytes": predicted["file_bytes"] + _work_bytes(prepared, shape, config),
        "flops": _flops(prepared, shape, config),
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


def _source(model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> DenseModel:
    if not isinstance(model, PreTrainedModel):
        return open_dense(model)
    if tokenizer is None:
        raise InputError("a model in memory comes without its tokenizer: give tokenizer=...")
    return DenseModel(model, tokenizer, model.dtype)


def _vocabulary(model: PreTrainedModel, config: QuantConfig) -> dict[str, PackedLinearSpec]:
    return vocabulary_specs(model) if config.head is Head.INT8 else {}


def _with_vocabulary(prepared: Prepared, vocabulary: Mapping[str, PackedLinearSpec]) -> Prepared:
    return replace(prepared, layout=replace(prepared.layout, vocabulary=vocabulary))


def _save_dtype(name: str, source: torch.dtype) -> torch.dtype:
    if name == "auto":
        return source if source in (torch.bfloat16, torch.float16) else torch.bfloat16
    if name not in DTYPES:
        raise InputError(unknown("dtype", name, ["auto", *DTYPES]))
    return DTYPES[name]


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and tensors: the same model or text whatever file it came from."""
    sums = [f"{name} {tensor_checksum(tensor)}\n" for name, tensor in tensors.items()]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def _run_record(
    config: QuantConfig,
    calibration: CalibrationConfig,
    tokens: Tensor,
    prepared: Prepared,
    records: Sequence[Mapping[str, Any]],
    distillation: Mapping[str, Any] | None,
    model: str | Path | PreTrainedModel,
) -> dict[str, Any]:
    """run.json: equal for equal runs, except what is under `timing`."""
    return {
        "model": model.config.name_or_path if isinstance(model, PreTrainedModel) else str(model),
        "config": asdict(config),
        "calibration": {**asdict(calibration), "tokens": tokens.numel()},
        "blocks": [{key: record[key] for key in ("index", "loss_first", "loss_last")} for record in records],
        "distillation": {k: v for k, v in distillation.items() if k != "seconds"} if distillation else None,
        "bits_per_weight": prepared.layout.bits_per_weight,
        "paper_bits": prepared.layout.paper_bits,
        "threads": torch.get_num_threads(),
        "versions": {
            "ptq161": ptq161.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "timing": {
            "block_seconds": [record["seconds"] for record in records],
            "distillation_seconds": (distillation or {}).get("seconds"),
        },
    }


def _stream_bytes(prepared: Prepared, shape: torch.Size) -> int:
    hidden: int = prepared.model.config.get_text_config().hidden_size
    return 4 * math.prod(shape) * hidden


def _fresh_samples(config: QuantConfig, calibration: CalibrationConfig) -> int:
    """Samples to draw besides the calibration ones: what distillation can use, and those it holds out."""
    if config.distill is Distill.OFF or config.method != "mixed" or not config.distill_fresh:
        return 0
    wanted = config.distill_tokens // calibration.seqlen
    return wanted + held_out_count(wanted)


def _work_bytes(prepared: Prepared, shape: torch.Size, config: QuantConfig) -> int:
    """Disk for the work in progress: packed blocks, and two streams, old and new at the moment of renaming.

    With distillation, the latents in float32 too, and old and new state: latents and two moments each.
    """
    latents = 0 if config.distill is Distill.OFF else prepared.layout.quantized_weights * 4 * (1 + 2 * 3)
    return sum(prepared.layout.parts().values()) + 4 * _stream_bytes(prepared, shape) + latents


def _memory_bytes(prepared: Prepared, shape: torch.Size, config: QuantConfig) -> int:
    """Estimated peak: the process, the model, and the greater of what the blocks and what distillation needs.

    The blocks need six streams, and per weight of one about seven float32 copies (original, base, signs,
    reconstruction, its gradient, and temporaries of the product rule).
    """
    process = 600_000_000
    model = sum(p.numel() * p.element_size() for p in prepared.model.parameters())
    largest = max(sum(p.numel() for p in block.parameters()) for block in prepared.blocks)
    blocks = 6 * _stream_bytes(prepared, shape) + 7 * 4 * largest
    distillation = 0
    if config.distill is not Distill.OFF:
        distillation = memory_bytes(prepared.model, prepared.layout.quantized_weights, shape[1], config)
    return process + model + max(blocks, distillation)


def _flops(prepared: Prepared, shape: torch.Size, config: QuantConfig) -> int:
    """Floating-point operations in the linears: two targets, two measurements, and three products per learning step.

    Compensation in place of learning takes about four: parts of the block on both streams, and moments of its inputs.
    Distillation takes one more product per token: the original's predictions.
    """
    instead = 4 if config.method == "mixed" and config.epochs == 0 else 0
    tokens = math.prod(shape) * (4 + 3 * config.epochs + instead)
    if config.distill is not Distill.OFF:
        tokens += config.distill_tokens * 4
    return 2 * prepared.layout.quantized_weights * tokens
