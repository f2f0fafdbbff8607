"""The once-quantized model that preprocessing starts from: can it be used, how was it made, its column groups."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ptq161 import pipeline
from ptq161.binarize import QuantizedWeight
from ptq161.config import CalibrationConfig, QuantConfig
from ptq161.dense import DenseModel
from ptq161.errors import CheckpointError, InputError
from ptq161.folder import RUN, read_json
from ptq161.hf import is_packed, load
from ptq161.linear import PackedLinear
from ptq161.packing import unpack
from ptq161.sources import open_config
from ptq161.verify import folder_problems
from ptq161.walk import OnProgress

Recipe = tuple[QuantConfig, CalibrationConfig]  # how to quantize


def check_quantized(folder: Path, source: DenseModel) -> None:
    """Raises InputError unless the folder is a sound packed checkpoint with the tensors of this model."""
    if not is_packed(folder):
        raise InputError(f"{folder} is not a packed ptq161 checkpoint: --quantized needs one, or leave it out")
    if problems := folder_problems(folder):
        raise CheckpointError(f"{folder} is damaged: {problems[0]}")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(open_config(folder))
    shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in (source.skeleton, theirs)]
    if shapes[0] != shapes[1]:
        name = min(shapes[0].items() ^ shapes[1].items())[0]
        raise InputError(f"{folder} is no quantized version of this model: they differ in {name}; give its own")


def recorded_recipe(folder: Path) -> Recipe:
    """How a packed checkpoint was quantized, from its run.json. Raises InputError if that does not say."""
    if not (folder / RUN).exists():
        raise InputError(f"{folder} has no {RUN}, which says how to quantize again for --ppl; leave --ppl out")
    run = read_json(folder, RUN)
    try:
        calibration = {key: run["calibration"][key] for key in CalibrationConfig.__dataclass_fields__}
        return QuantConfig().replaced(run["config"]), CalibrationConfig().replaced(calibration)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / RUN} is not a record of ptq161 quantize; leave --ppl out") from error


def preset_recipe(preset: str, calib: Sequence[str]) -> Recipe:
    """A preset on a text. Raises InputError for an unknown one."""
    return pipeline.settings(preset, calib, None, None, None, {})


def quantize_by(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    device: torch.device,
    on_progress: OnProgress,
) -> None:
    """Quantize a model into a packed checkpoint, continuing an interrupted run, unless the folder is there already."""
    if folder.exists():
        return
    config, calibration = recipe
    pipeline.quantize(
        model,
        folder,
        tokenizer=tokenizer,
        calib=calibration.sources,
        samples=calibration.samples,
        seqlen=calibration.seqlen,
        device=str(device),
        on_progress=on_progress,
        **asdict(config),
    )


def column_groups(folder: Path, linears: Iterable[str], device: torch.device) -> dict[str, QuantizedWeight]:
    """Some linears of a packed checkpoint, not reconstructed. Raises InputError if one of them is not packed."""
    packed = load(folder, mode="packed", device=device)
    groups = {}
    for name in linears:
        module = packed.get_submodule(name)
        if not isinstance(module, PackedLinear):
            raise InputError(f"{folder} has {name} left dense: through=true needs every target quantized")
        groups[name] = unpack(module.packed())
    return groups
