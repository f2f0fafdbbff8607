"""What can stand in a comparison. A contender makes a model out of the original and says what storing it takes.

Named as METHOD[:SETTING=VALUE[:...]]: a preset, whose packed checkpoint is made by the ordinary pipeline, or one of
BASELINES, whose dense weights replace those of a copy in memory. `llamacpp:TYPE` is a file of llama.cpp, `autoround`
what the package of that name makes.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161 import llamacpp, pipeline
from ptq161.autoround import AutoRoundSettings, quantize_with_autoround
from ptq161.baselines import apply_baseline
from ptq161.config import PRESETS, CalibrationConfig, converted, unknown
from ptq161.dense import DenseModel
from ptq161.errors import InputError
from ptq161.folder import RUN, read_json
from ptq161.hf import load
from ptq161.inspection import inspect
from ptq161.methods import BASELINES, Baseline

FULL_PRECISION = "full-precision"  # the first row of every comparison
LLAMACPP = "llamacpp"
AUTOROUND = "autoround"


@dataclass(frozen=True)
class Subject:
    """The model that every contender starts from, and what all of them are given.

    path: where it was read from. preprocessing: what was done to it beforehand; None for the original.
    samples: the calibration tokens that `calibration` stands for. dtype: what every row is evaluated in.
    folder: where the packed checkpoints made of it are kept.
    """

    path: str
    preprocessing: str | None
    dense: DenseModel
    tokenizer: PreTrainedTokenizerBase
    calibration: CalibrationConfig
    samples: Int64[Tensor, "samples seq"]
    device: torch.device
    dtype: torch.dtype
    folder: Path

    def fresh(self) -> PreTrainedModel:
        """A copy of the model that can be changed; `whole` shares memory with what the next one is filled from."""
        return copy.deepcopy(self.dense.whole())


@dataclass(frozen=True)
class Candidate:
    """What a contender made.

    model: to be evaluated, on any device and in any dtype. config: every setting of the method.
    parts: part (codes, scales, ...) -> bits over all quantized linears; weights: how many they have. None for a model
    that is not quantized. layers: how many channels of which linears have which code width, where that differs.
    blocks: one record per decoder block, with its `index` and `seconds`.
    continued: begun by an earlier run, so that its time is not known.
    """

    model: PreTrainedModel
    config: dict[str, Any] | None = None
    parts: dict[str, int] | None = None
    weights: int | None = None
    claimed_bits: float | None = None
    file_bytes: int | None = None
    layers: list[dict[str, Any]] | None = None
    blocks: list[dict[str, Any]] | None = None
    continued: bool = False

    @property
    def bits_per_weight(self) -> float | None:
        """Honest bits: all that is stored because of quantization, over the weights of the linears."""
        return None if self.parts is None or self.weights is None else sum(self.parts.values()) / self.weights


OnStep = Callable[[str, int, int], None]  # what is done, steps done, steps in all


# Makes a candidate of a subject, which it leaves as it is. Raises InputError where it cannot take the model.
Contender = Callable[[Subject, OnStep], Candidate]


def contender(name: str) -> Contender:
    """The contender of this name, such as `gptq-w2g128` or `paper:epochs=4`.

    Raises InputError for a method or setting that there is not.
    """
    method, *pairs = name.split(":")
    if method == LLAMACPP:
        return LlamaCppFile(name, llamacpp.file_type(":".join(pairs)))
    settings = dict(_pair(name, pair) for pair in pairs)
    if method in PRESETS:
        pipeline.settings(method, None, None, None, None, settings)  # refuses what there is not
        return PackedPreset(name, method, settings)
    if method in BASELINES:
        baseline: Any = BASELINES[method]
        return DenseBaseline(replace(baseline, **converted(type(baseline), settings)))
    if method == AUTOROUND:
        return AutoRoundModel(replace(AutoRoundSettings(), **converted(AutoRoundSettings, settings)))
    raise InputError(unknown("method", method, [*PRESETS, *BASELINES, f"{LLAMACPP}:TYPE", AUTOROUND]))


def full_precision(subject: Subject, on_step: OnStep) -> Candidate:
    """The model as it is."""
    return Candidate(subject.fresh())


@dataclass(frozen=True)
class PackedPreset:
    """One of PRESETS with some settings of its own: what `ptq161 quantize --preset` makes."""

    name: str
    preset: str
    settings: dict[str, Any]

    def __call__(self, subject: Subject, on_step: OnStep) -> Candidate:
        """Quantize into the subject's folder, or take what an earlier run has left there."""
        out = subject.folder / self.name.replace(":", ",")
        continued = out.exists() or out.with_name(f"{out.name}.partial").exists()

        def on_progress(progress: pipeline.Progress) -> None:
            within = progress.block - progress.first, progress.last - progress.first
            on_step(progress.phase, *((progress.step, progress.steps) if progress.phase in STAGES else within))

        if not out.exists():
            calibration = subject.calibration
            pipeline.quantize(
                subject.path,
                out,
                preset=self.preset,
                calib=calibration.sources,
                samples=calibration.samples,
                seqlen=calibration.seqlen,
                seed=calibration.seed,
                device=str(subject.device),
                on_progress=on_progress,
                **self.settings,
            )
        run, sizes = read_json(out, RUN), inspect(out)
        return Candidate(
            model=load(out, dtype=subject.dtype, mode="dense"),
            config=run["config"],
            parts={part: 8 * size for part, size in sizes["parts"].items() if size},
            weights=sizes["quantized_weights"],
            claimed_bits=sizes["paper_bits"] or sizes["bits_per_weight"],
            file_bytes=sizes["file_bytes"],
            layers=[{key: layer[key] for key in ("rows", "cols", "linears", "columns")} for layer in sizes["layers"]],
            blocks=[
                {**block, "seconds": seconds}
                for block, seconds in zip(run["blocks"], run["timing"]["block_seconds"], strict=True)
            ],
            continued=continued,
        )


STAGES = {"measure", "write", "distill"}  # phases of the pipeline that go over the whole model


@dataclass(frozen=True)
class DenseBaseline:
    """One of BASELINES with its settings."""

    baseline: Baseline

    def __call__(self, subject: Subject, on_step: OnStep) -> Candidate:
        """Apply it to a copy of the model."""
        blocks = len(subject.dense.blocks)
        result = apply_baseline(
            subject.fresh(),
            subject.samples,
            self.baseline,
            seed=subject.calibration.seed,
            device=subject.device,
            on_block=lambda record: on_step("block", record["index"] + 1, blocks),
        )
        return Candidate(
            model=result.model,
            config=asdict(self.baseline),  # type: ignore[call-overload]
            parts=result.parts,
            weights=result.weights,
            claimed_bits=self.baseline.claimed_bits,
            blocks=result.blocks,
        )


@dataclass(frozen=True)
class LlamaCppFile:
    """What llama.cpp's quantizers make of the model; its GGUF file, without a tokenizer, stays in the folder."""

    name: str
    mix: llamacpp.Mix

    def __call__(self, subject: Subject, on_step: OnStep) -> Candidate:
        """Quantize a copy of the model. Raises InputError where there is no llama.cpp, or the model is not for it."""
        subject.folder.mkdir(parents=True, exist_ok=True)
        result = llamacpp.quantize_with_llamacpp(
            subject.fresh(),
            subject.samples,
            self.mix,
            subject.folder / f"{self.name.replace(':', ',')}.gguf",
            on_block=lambda done, total: on_step("block", done, total),
        )
        return Candidate(
            model=result.model,
            config=result.config,
            parts=result.parts,
            weights=result.weights,
            claimed_bits=result.claimed_bits,
            file_bytes=result.file_bytes,
        )


@dataclass(frozen=True)
class AutoRoundModel:
    """What AutoRound makes of the model; it draws its own progress."""

    settings: AutoRoundSettings

    def __call__(self, subject: Subject, on_step: OnStep) -> Candidate:
        """Quantize a copy of the model. Raises InputError where AutoRound is missing or does not take the model."""
        on_step("block", 0, len(subject.dense.blocks))
        result = quantize_with_autoround(
            subject.fresh(), subject.samples, self.settings, seed=subject.calibration.seed, device=subject.device
        )
        return Candidate(
            model=result.model,
            config=asdict(self.settings),
            parts=result.parts,
            weights=result.weights,
            claimed_bits=self.settings.bits,
        )


def _pair(name: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"method {name!r}: expected METHOD:SETTING=VALUE, e.g. paper:epochs=4")
    return key, value
