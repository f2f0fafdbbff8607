"""The packed checkpoint as a folder of files: their names, how to open them without trusting them, and checksums.

Every function that raises CheckpointError here says what is wrong with a file; the caller knows which one it asked for.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq161.errors import CheckpointError

METHOD = "ptq161"  # quantization_config.quant_method
CONFIG, RUN, CARD = "config.json", "run.json", "README.md"
WEIGHTS, INDEX, CHECKSUMS = "model.safetensors", "model.safetensors.index.json", "checksums.json"
MISSING = "is missing"
MAX_JSON_BYTES = 2**28  # no honest header or tokenizer is larger


def quantization_config(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a packed checkpoint's config.json. Raises CheckpointError if there is none."""
    quantization = read_json(folder, CONFIG).get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(f"has no quantization_config of {METHOD}: this is not a packed checkpoint")
    return quantization


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one JSON object of the folder. Raises CheckpointError."""
    refused = path_problem(folder, name)
    if refused is not None:
        raise CheckpointError(refused)
    path = folder / name
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"has {size} bytes, more than any JSON file of a checkpoint")
        content = json.loads(path.read_bytes(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise CheckpointError("is not valid JSON: nested too deeply") from error
    except CheckpointError:
        raise
    except ValueError as error:  # bad UTF-8, bad JSON, or a number of thousands of digits
        raise CheckpointError(f"is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a JSON {type(content).__name__}, expected an object")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def path_problem(folder: Path, name: str) -> str | None:
    """Why `name` must not be opened as a file of this folder, or None: only plain files that lie in it are.

    The one exception is the Hugging Face cache, whose snapshot folders link to the blobs beside them.
    """
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
        return "is not a plain file name"
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return MISSING
    if not os.path.isfile(path):
        return "is not a regular file"
    root = os.path.realpath(folder)
    allowed = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    if os.path.dirname(os.path.realpath(path)) not in allowed:
        return "is a link to a file outside the folder"
    return None


def shards(folder: Path) -> dict[str, set[str]]:
    """Weight files of the folder, each with the tensors that the index puts into it (none where there is no index).

    Raises CheckpointError about the index.
    """
    if os.path.lexists(folder / WEIGHTS) or not os.path.lexists(folder / INDEX):
        return {WEIGHTS: set()}
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map")
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(f"puts tensor {tensor} into {file!r}, expected a .safetensors file")
        files.setdefault(file, set()).add(tensor)
    return files


def read_checksums(folder: Path) -> dict[str, dict[str, str | None]]:
    """Tables of sha256 by file (None: it only has to be there) and by tensor. Raises CheckpointError."""
    checksums = read_json(folder, CHECKSUMS)
    for key in ("files", "tensors"):
        table = checksums.get(key)
        if not isinstance(table, dict) or not all(value is None or isinstance(value, str) for value in table.values()):
            raise CheckpointError(f"has no table {key!r} of checksums")
    return checksums


def write_checksums(folder: Path, tensors: dict[str, str]) -> None:
    """Write checksums.json for the folder as it is; README.md is free to change, run.json has to stay readable."""
    files = {
        path.name: None if path.name == RUN else file_checksum(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (CARD, CHECKSUMS)
    }
    write_json(folder / CHECKSUMS, {"files": files, "tensors": dict(sorted(tensors.items()))})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def file_checksum(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_checksum(tensor: Tensor) -> str:
    """sha256 of the line `dtype[shape]` (such as `uint8[576, 59]`) and the tensor's bytes as stored, hexadecimal."""
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}\n".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a file stores them, without copying a contiguous one on the CPU."""
    content: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return content
