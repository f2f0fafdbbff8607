"""What a command's options come to: defaults, presets, and what overrides what. Light: imports only settings."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ptq161.config import (
    CalibrationConfig,
    PreprocessConfig,
    QuantConfig,
    preset_named,
    read_toml,
    unknown,
)
from ptq161.errors import InputError

BASELINES = (
    "rtn-w2",
    "rtn-w2g128",
    "gptq-w2",
    "gptq-w2g128",
    "gptq-w3g128",
    "gptq-w4g128",
    "awq-w2g128",
    "awq-w3g128",
    "awq-w4g128",
    "omniquant-w2g128",
    "omniquant-w2g64",
    "quip-w2",
    "owq-w2",
    "owq-w3",
    "owq-w4",
    "pb-llm",
    "billm",
    "smoothquant-w4a4",
)
# What `compare` takes where it is not told: as the literature compares, and what is done in minutes on a CPU.
FULL: dict[str, Any] = {
    "methods": ("paper", "fast", "best", *BASELINES),
    "samples": 128,
    "seqlen": 2048,
    "max_windows": None,
}
QUICK: dict[str, Any] = {
    "methods": (  # what takes long comes last
        "rtn-w2g128",
        "gptq-w2g128",
        "paper:epochs=4",
        "fast",
        "pb-llm",
        "quip-w2",
        "smoothquant-w4a4",
        "billm",
        "gptq-w4g128",
        "owq-w2",
        "awq-w2g128",
    ),
    "samples": 16,
    "seqlen": 256,
    "window": 512,
    "max_windows": 16,
}
EXCLUSIVE = {"bits": "salient_ratio", "salient_ratio": "bits"}


def compare_settings(args: Namespace) -> dict[str, Any]:
    """What `--quick` and the options of `compare` come to. Raises InputError for an option out of range."""
    if args.out is None:
        raise InputError("compare needs a folder for its results: give --out DIR")
    settings = dict(QUICK if args.quick else FULL)
    given = {key: getattr(args, key) for key in ("methods", "samples", "seqlen", "window", "max_windows")}
    settings |= {key: value for key, value in given.items() if value is not None}
    settings.setdefault("window", settings["seqlen"])
    if twice := [name for name in settings["methods"] if settings["methods"].count(name) > 1]:
        raise InputError(f"--methods has {twice[0]!r} twice: give each once")
    calibration = {"sources": args.calib, "samples": settings.pop("samples"), "seqlen": settings.pop("seqlen")}
    settings["calibration"] = CalibrationConfig().replaced(calibration | {"seed": args.seed})
    data = None if args.task_data is None else str(args.task_data)
    tasks = {"names": args.tasks, "data": data, "limit": args.limit, "shots": args.shots} if args.tasks else None
    return settings | {"ppl": tuple(args.ppl), "preprocessed": args.preprocessed, "tasks": tasks}


def preprocess_settings(args: Namespace) -> dict[str, Any]:
    """Fields of PreprocessConfig: --set under the options of their own. Raises InputError."""
    options = {name: getattr(args, name) for name in ("steps", "rank", "lr", "seqlen", "seed")}
    options["targets"] = None if args.target is None else tuple(args.target)
    values = dict(args.set) | {key: value for key, value in options.items() if value is not None}
    PreprocessConfig().replaced(values)
    return values


def quantize_settings(args: Namespace) -> dict[str, Any]:
    """Keywords for the pipeline: --config under --set under the options of their own. Raises InputError.

    Naming bits on one layer drops a salient ratio of the layers below, and the other way round.
    """
    quant_keys, calibration_keys = (set(kind.__dataclass_fields__) for kind in (QuantConfig, CalibrationConfig))
    options = {key: getattr(args, key, None) for key in sorted(quant_keys | calibration_keys)}
    options["sources"] = args.calib
    layers: list[Mapping[str, Any]] = [{} if args.config is None else read_toml(args.config), dict(args.set)]
    values: dict[str, Any] = {}
    for layer in [*layers, {key: value for key, value in options.items() if value is not None}]:
        for key in layer:
            if key not in quant_keys | calibration_keys:
                raise InputError(unknown("setting", key, sorted(quant_keys | calibration_keys)))
        values |= {EXCLUSIVE[key]: None for key in layer.keys() & EXCLUSIVE.keys()} | dict(layer)
    preset = preset_named(args.preset)
    preset.quant.replaced({key: value for key, value in values.items() if key in quant_keys})
    calibration = preset.calibration.replaced({key: value for key, value in values.items() if key in calibration_keys})
    given = {key: getattr(calibration, key) for key in values.keys() & calibration_keys}
    if "sources" in given:
        given["calib"] = given.pop("sources")
    return (
        {key: value for key, value in values.items() if key not in calibration_keys} | given | {"preset": args.preset}
    )
