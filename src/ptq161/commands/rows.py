"""The row that `eval --out` appends to a results.jsonl, and what a checkpoint's own record brings to it."""

import json
import shlex
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ptq161
from ptq161.errors import InputError


def weight_bytes(path: str) -> int | None:
    """Size of a local model's weight files; None for a name on the hub."""
    place = Path(path)
    if place.is_file():
        return place.stat().st_size
    files = list(place.glob("*.safetensors")) or list(place.glob("*.bin"))
    return sum(file.stat().st_size for file in files) if files else None


def recorded(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the calibration that a packed checkpoint's run.json names; empty where it has none."""
    from ptq161.folder import RUN, read_json

    if not (folder / RUN).exists():
        return {}, {}
    run = read_json(folder, RUN)
    config, calibration = run.get("config", {}), run.get("calibration", {})
    sources = calibration.get("sources", []) if isinstance(calibration, dict) else None
    if not isinstance(config, dict) or not isinstance(sources, list) or not all(isinstance(s, str) for s in sources):
        raise InputError(
            f"{folder / RUN} is not a record of ptq161 quantize; move it away, and the row goes without it"
        )
    return config, calibration


def append_row(
    args: Namespace,
    result: Mapping[str, Any],
    sizes: Mapping[str, Any] | None,
    record: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Append one row of results.jsonl; what is not known of the model is null."""
    import torch

    config, calibration = record
    texts = calibration.get("sources", [])
    row = {
        "schema": 1,
        "model": args.path,
        "revision": None,
        "method": config.get("method"),
        "preprocessing": None,
        "config": config or None,
        # Of a mix, only the sum is recorded.
        "calib": {text: calibration.get("tokens") if len(texts) == 1 else None for text in texts} or None,
        "bits_per_weight": result["bits_per_weight"],
        "claimed_bits": None if sizes is None else sizes["paper_bits"],
        "file_bytes": weight_bytes(args.path) if sizes is None else sizes["file_bytes"],
        "perplexity": result["perplexity"],
        "tasks": result["tasks"],
        "seconds": result["seconds"],
        "peak_rss_bytes": result["peak_rss_bytes"],
        "seed": config.get("seed"),
        "threads": torch.get_num_threads(),
        "version": ptq161.__version__,
        "command": shlex.join(["ptq161", *args.arguments]),
        "status": "ok",
        "reason": None,
    }
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
