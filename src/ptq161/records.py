"""What a run leaves in writing: what it is told by, so that only the same one continues it, and run.json."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import Tensor

import ptq161
from ptq161 import ranks
from ptq161.config import CalibrationConfig, QuantConfig
from ptq161.folder import tensor_checksum
from ptq161.walk import Prepared


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and tensors, one at a time: the same model or text whatever file it came from."""
    sums = [f"{name} {tensor_checksum(tensor)}\n" for name, tensor in tensors.items()]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def job(
    prepared: Prepared,
    config: QuantConfig,
    tokens: Tensor,
    fresh: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides about the bytes of the result; reads all weights once."""
    return {
        "model": fingerprint(prepared.model.weights),
        "config": asdict(config),
        "calibration": fingerprint({"tokens": tokens, "fresh": fresh}),
        "blocks": [prepared.first, prepared.last],
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "ranks": ranks.count(),
        "ptq161": ptq161.__version__,
    }


def run_record(
    name: str,
    config: QuantConfig,
    calibration: CalibrationConfig,
    tokens: Tensor,
    prepared: Prepared,
    records: Sequence[Mapping[str, Any]],
    distillation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """run.json: equal for equal runs, except what is under `timing`."""
    return {
        "model": name,
        "config": asdict(config),
        "calibration": {**asdict(calibration), "tokens": tokens.numel()},
        "blocks": [{key: record[key] for key in ("index", "loss_first", "loss_last")} for record in records],
        "distillation": {k: v for k, v in distillation.items() if k != "seconds"} if distillation else None,
        "bits_per_weight": prepared.layout.bits_per_weight,
        "paper_bits": prepared.layout.paper_bits,
        "threads": torch.get_num_threads(),
        "ranks": ranks.count(),
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
