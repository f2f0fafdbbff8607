"""The end-to-end stage of a run: whether distillation can be done, the model it needs whole, its state on disk."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from ptq161 import ranks
from ptq161.allocator import kept_memory
from ptq161.arithmetic import products_dtype, widen
from ptq161.blocks import float32_vectors
from ptq161.checkpoint import WorkFolder
from ptq161.config import CalibrationConfig, Distill, QuantConfig
from ptq161.dense import DenseModel
from ptq161.discovery import decoder_blocks, without_blocks
from ptq161.distill import held_out_count, step_count, tune, written_count
from ptq161.errors import InputError, Ptq161Error
from ptq161.machine import free_memory_bytes
from ptq161.selftext import continuations
from ptq161.student import memory_bytes, student_of
from ptq161.walk import OnProgress, Prepared, Progress, packed_tensors


@dataclass(frozen=True)
class Tuned:
    """What the stage gave: its JSON record, and tensors to be stored instead of the blocks', by full name."""

    record: dict[str, Any]
    packed: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]


@dataclass(frozen=True)
class Text:
    """What distillation is to learn from. fresh: the blocks were learned from other samples."""

    samples: Int64[Tensor, "samples seq"]
    fresh: bool

    @property
    def judging(self) -> int:
        """How many of the samples are not learned from. None of those that blocks know: they could not judge."""
        return held_out_count(len(self.samples)) if self.fresh else 0


@dataclass(frozen=True)
class Obstacle:
    """Why distillation cannot run; `now` is what may be otherwise in an equal run: how much memory is free."""

    reason: str
    now: str = ""

    def __str__(self) -> str:
        """The whole sentence, for an error message."""
        return self.reason + self.now


def fresh_samples(config: QuantConfig, calibration: CalibrationConfig) -> int:
    """Samples to draw besides the calibration ones: what distillation can use, and those it holds out."""
    if config.distill is Distill.OFF or config.method != "mixed" or not config.distill_fresh:
        return 0
    wanted = config.distill_tokens // calibration.seqlen
    return wanted + held_out_count(wanted)


def learned_text(config: QuantConfig, tokens: Int64[Tensor, "samples seq"], fresh: Int64[Tensor, "fresh seq"]) -> Text:
    """Fresh samples, or the calibration samples again where the text has no more."""
    enough = len(fresh) - held_out_count(len(fresh)) >= config.distill_batch_size
    return Text(fresh, fresh=True) if config.distill_fresh and enough else Text(tokens, fresh=False)


def check_required(prepared: Prepared, config: QuantConfig, text: Text, device: torch.device) -> None:
    """Raises InputError if distillation is required and cannot run."""
    if config.distill is Distill.REQUIRED and (obstacle := _obstacle(prepared, config, text, device)):
        raise InputError(f"distillation {obstacle}; give what it needs, or --set distill=auto")


def distill(
    work: WorkFolder,
    prepared: Prepared,
    text: Text,
    config: QuantConfig,
    device: torch.device,
    on_progress: OnProgress,
) -> Tuned | None:
    """Tune the whole model after its blocks, continuing from the state in `work`.

    None where it is off; where it cannot run, the record says why under `skipped`. Raises Ptq161Error in that case if
    it is required.
    """
    if config.distill is Distill.OFF:
        return None
    obstacles = ranks.gathered(_obstacle(prepared, config, text, device))
    if obstacle := next(filter(None, obstacles), None):
        if config.distill is Distill.REQUIRED:
            raise Ptq161Error(f"distillation {obstacle}; finished blocks are kept, the same command continues")
        return Tuned({"skipped": obstacle.reason}, {}, {})
    began = time.monotonic()

    def report(phase: str, step: int, steps: int, loss: float | None) -> None:
        seconds = time.monotonic() - began
        on_progress(Progress(prepared.last, prepared.first, prepared.last, phase, step, steps, loss, seconds))

    model = prepared.model.whole()
    dtype = products_dtype(config.compute, device)
    with without_blocks(decoder_blocks(model)[1]):
        model.float()
    widen(model, dtype)
    model.to(device)  # type: ignore[arg-type]
    recomputed = _recomputed_blocks(prepared, config, text.samples, device)
    with float32_vectors(model), _kept_memory(prepared, config, text.samples, device, recomputed=bool(recomputed)):
        held_out, read, written = _divided(work, model, text, config, partial(report, "write", loss=None))
        saved = work.load_latents(prepared.layout, prepared.first, prepared.last)
        latents = {name: weight.to(device) for name, weight in saved.items()}
        student = student_of(model, latents, dtype, recomputed)
        learned = torch.cat([read, written]).to(device)
        state = work.load_distillation()
        save = work.save_distillation if ranks.first() else lambda state: None
        record = tune(model, student, held_out.to(device), learned, config, state, partial(report, "distill"), save)
    record |= {"written_tokens": written.numel(), "fresh": text.fresh, "seconds": time.monotonic() - began}
    if not record["kept"]:
        return Tuned(record, {}, {})
    packed = packed_tensors({name: weight.quantized() for name, weight in latents.items()}, prepared.layout)
    return Tuned(record, packed, {name: norm.detach() for name, norm in student.norms.items()})


def _divided(
    work: WorkFolder, model: PreTrainedModel, text: Text, config: QuantConfig, on_step: Callable[[int, int], None]
) -> tuple[Int64[Tensor, "held_out seq"], Int64[Tensor, "read seq"], Int64[Tensor, "written seq"]]:
    """Samples that judge, and those to learn from: of the text, and written besides. All ranks have the same."""
    held_out, read = text.samples.split([text.judging, len(text.samples) - text.judging])
    added = written_count(len(read), read.shape[1], config)
    judging = 0 if text.fresh else held_out_count(len(read) + added)
    written = ranks.from_first(lambda: _written(work, model, read, judging + added, config.seed, on_step))
    return (held_out if text.fresh else written[:judging]), read, written[judging:]


def _written(
    work: WorkFolder,
    model: PreTrainedModel,
    text: Int64[Tensor, "samples seq"],
    count: int,
    seed: int,
    on_step: Callable[[int, int], None],
) -> Int64[Tensor, "written seq"]:
    """What the original adds to a text, kept in `work`: a continued run does not write it again."""
    if not count:
        return text[:0]
    written = work.load_written()
    if written is None:
        mixed = any(parameter.dtype != torch.float32 for parameter in model.parameters())
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
            written = continuations(model, text, count, torch.Generator().manual_seed(seed), on_step)
        work.save_written(written)
    return written


def needed_bytes(
    model: DenseModel, weights: int, seqlen: int, config: QuantConfig, device: torch.device, *, recomputed: bool = False
) -> int:
    """Estimated memory that distillation takes: the model, unless it is in memory anyway, and what is learned.

    recomputed: blocks keep nothing but their inputs for the backward pass.
    """
    dtype = products_dtype(config.compute, device)
    widened = outside_weights(model) + (inside_weights(model) if dtype == torch.float32 else 0)
    copies = 0 if model.dtype == torch.float32 else 4 * widened
    learned = memory_bytes(model.skeleton, weights, seqlen, config, dtype, recomputed=recomputed)
    return copies + (0 if model.resident else model.nbytes) + learned


def outside_weights(model: DenseModel) -> int:
    """How many weights are in no decoder block: embedding, head and norms."""
    return sum(p.numel() for p in model.skeleton.parameters()) - inside_weights(model)


def inside_weights(model: DenseModel) -> int:
    """How many weights are in the decoder blocks."""
    return sum(p.numel() for p in model.blocks.parameters())


def _obstacle(prepared: Prepared, config: QuantConfig, text: Text, device: torch.device) -> Obstacle | None:
    """Why distillation cannot run, if it cannot: a method that learns no codes, too little text or memory."""
    if config.method != "mixed":
        return Obstacle(f"needs codes that are learned, and those of method {config.method} are not")
    count, seqlen = text.samples.shape
    read = count - text.judging
    if step_count(read + written_count(read, seqlen, config), seqlen, config) < 1:
        return Obstacle(
            f"needs {config.distill_batch_size} samples besides the {text.judging} held out, and distill_tokens for "
            f"them; there are {count} of {seqlen} tokens, and distill_tokens={config.distill_tokens}"
        )
    weights = prepared.layout.quantized_weights
    needed = needed_bytes(prepared.model, weights, seqlen, config, device, recomputed=True)
    available = free_memory_bytes(device)
    if available is None or needed <= available:
        return None
    return Obstacle(f"needs about {needed / 1e9:.1f} GB more memory", f", {available / 1e9:.1f} GB are free")


def _recomputed_blocks(
    prepared: Prepared, config: QuantConfig, samples: Tensor, device: torch.device
) -> tuple[str, ...]:
    """The blocks that distillation computes twice: none where memory suffices, which changes time and nothing else."""
    needed = needed_bytes(prepared.model, prepared.layout.quantized_weights, samples.shape[1], config, device)
    available = free_memory_bytes(device)
    if not any(ranks.gathered(available is not None and needed > available)):
        return ()
    return tuple(f"{prepared.model.prefix}.{index}" for index in range(len(prepared.model.blocks)))


def _kept_memory(
    prepared: Prepared, config: QuantConfig, samples: Tensor, device: torch.device, *, recomputed: bool
) -> AbstractContextManager[None]:
    """On a CPU, where taking its memory anew is a good part of a step's time (docs/decisions/0023)."""
    if device.type != "cpu":
        return nullcontext()
    weights, seqlen = prepared.layout.quantized_weights, samples.shape[1]
    dtype = products_dtype(config.compute, device)
    return kept_memory(memory_bytes(prepared.model.skeleton, weights, seqlen, config, dtype, recomputed=recomputed))
