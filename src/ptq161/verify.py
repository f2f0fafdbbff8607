"""Check every file and tensor of a packed checkpoint: a damaged or hostile folder becomes a list of problems."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptq161.errors import CheckpointError, one_line
from ptq161.folder import (
    CHECKSUMS,
    CONFIG,
    INDEX,
    MAX_JSON_BYTES,
    MISSING,
    WEIGHTS,
    file_checksum,
    path_problem,
    quantization_config,
    read_checksums,
    read_json,
    shards,
    tensor_checksum,
)
from ptq161.foreign import config_problem
from ptq161.layout import ModelLayout
from ptq161.packing import COLUMN_TYPES, problems

Checksums = Mapping[str, str | None]
ADAPTER = "adapter_config.json"
FOREIGN_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: in which file of the folder, with which tensor (None: the file as a whole), and what."""

    file: str
    tensor: str | None
    what: str

    def __str__(self) -> str:
        """One line for an error message."""
        return f"{self.file}: {self.what}" if self.tensor is None else f"{self.file}: tensor {self.tensor} {self.what}"


def verify(path: str | Path) -> dict[str, Any]:
    """Check a packed checkpoint: {"ok": bool, "problems": [{"file", "tensor", "what"}, ...]}; tensor may be None."""
    found = folder_problems(Path(path))
    return {"ok": not found, "problems": [asdict(problem) for problem in found]}


def folder_problems(folder: Path, *, partial: bool = False) -> list[Problem]:
    """Everything wrong with a packed checkpoint, each thing once, in the order of checking.

    partial: files other than weights may be missing, as they are where transformers fetched a model from a hub.
    """
    return [
        Problem(one_line(problem.file), problem.tensor and one_line(problem.tensor), one_line(problem.what))
        for problem in dict.fromkeys(_problems(folder, partial))
    ]


def _problems(folder: Path, partial: bool) -> list[Problem]:
    if not os.path.isdir(folder):
        return [Problem(str(folder), None, "is not a folder; expected a packed checkpoint")]
    try:
        config = read_json(folder, CONFIG)
        refused = "has auto_map: a packed checkpoint brings no code" if "auto_map" in config else config_problem(config)
        if refused is not None:
            return [Problem(CONFIG, None, refused)]
        quantization = quantization_config(folder)
        layout = ModelLayout.from_dict(quantization)
    except CheckpointError as error:
        return [Problem(CONFIG, None, str(error))]
    found = list(_bits_problems(quantization, layout))
    files: Checksums = {}
    tensors: Checksums | None = None
    if (quantization.get("checksums") and not partial) or os.path.lexists(folder / CHECKSUMS):
        try:
            checksums = read_checksums(folder)
            files, tensors = checksums["files"], checksums["tensors"]
        except CheckpointError as error:
            found.append(Problem(CHECKSUMS, None, str(error)))
    found += (problem for problem in _file_problems(folder, files) if not (partial and problem.what == MISSING))
    found += _weight_problems(folder, layout, tensors)
    return found


def _bits_problems(quantization: Mapping[str, Any], layout: ModelLayout) -> Iterator[Problem]:
    if not layout.linears:
        yield Problem(CONFIG, None, "names no packed linear")
    elif quantization.get("bits_per_weight") != layout.bits_per_weight:
        said = quantization.get("bits_per_weight")
        yield Problem(CONFIG, None, f"says {said!r} bits per weight, but its layouts make {layout.bits_per_weight}")


def _file_problems(folder: Path, checksums: Checksums) -> Iterator[Problem]:
    """Files that are missing, changed, unreadable as JSON, links to elsewhere, or weights in another form."""
    present = sorted(os.listdir(folder))
    for name in [*present, *sorted(checksums.keys() - set(present))]:
        refused = path_problem(folder, name)
        if refused is not None:
            if name in checksums or not os.path.isdir(folder / name):  # nothing in subfolders is ever read
                yield Problem(name, None, refused)
        elif name == ADAPTER:
            yield Problem(name, None, "is not part of a packed checkpoint; transformers would change the model by it")
        elif name.lower().endswith(FOREIGN_WEIGHTS):
            yield Problem(name, None, "is not safetensors; a packed checkpoint keeps weights in no other kind of file")
        else:
            try:
                if name.endswith(".json"):
                    read_json(folder, name)
                if checksums.get(name) is not None and checksums[name] != file_checksum(folder / name):
                    yield Problem(name, None, f"is not as it was saved (its sha256 is not the one in {CHECKSUMS})")
            except CheckpointError as error:
                yield Problem(name, None, str(error))
            except OSError as error:
                yield Problem(name, None, f"cannot be read: {error.strerror}")


def _weight_problems(folder: Path, layout: ModelLayout, checksums: Checksums | None) -> Iterator[Problem]:
    try:
        files = shards(folder)
    except CheckpointError as error:
        yield Problem(INDEX, None, str(error))
        return
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors") and name not in files:
            yield Problem(name, None, "does not belong to this checkpoint")
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for name in files:
            refused = path_problem(folder, name)
            if refused is not None:
                yield Problem(name, None, refused)
                continue
            try:
                opened[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                yield from _unreadable(folder / name, error)
        if opened.keys() == files.keys():
            yield from _tensor_problems(files, opened, layout, checksums)


def _unreadable(path: Path, error: Exception) -> Iterator[Problem]:
    """Name the tensors that a truncated file has lost; if it is not that, quote the reader's own words."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(start - 8)) if start <= min(size, MAX_JSON_BYTES) else {}
        ends = {tensor: start + entry["data_offsets"][1] for tensor, entry in entries.items() if "shape" in entry}
        lost = {tensor: end for tensor, end in ends.items() if end > size}
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError):
        lost = {}
    for tensor, end in lost.items():
        yield Problem(path.name, tensor, f"is cut off: it ends at byte {end}, the file at byte {size}")
    if not lost:
        yield Problem(path.name, None, f"is not a readable safetensors file: {error}")


def _tensor_problems(
    files: Mapping[str, set[str]], opened: Mapping[str, Any], layout: ModelLayout, checksums: Checksums | None
) -> Iterator[Problem]:
    home = WEIGHTS if WEIGHTS in files else INDEX
    file_of = dict.fromkeys(layout.tensor_specs(), home)
    tensors: dict[str, Tensor] = {}  # memory-mapped
    for file, promised in files.items():
        stored = set(opened[file].keys())
        file_of |= dict.fromkeys(promised or stored, file)
        for tensor in sorted(promised - stored):
            yield Problem(file, tensor, "is missing")
        for tensor in sorted(stored):
            if promised and tensor not in promised:
                yield Problem(file, tensor, "is not in the index")
                continue
            try:
                tensors[tensor] = opened[file].get_tensor(tensor)
            except SafetensorError as error:
                yield Problem(file, tensor, f"cannot be read: {error}")
    yield from _linear_problems(tensors, file_of, layout)
    if checksums is not None:
        yield from _checksum_problems(tensors, file_of, home, checksums)
        return
    packed = layout.modules
    for tensor in sorted(tensors.keys() - layout.tensor_specs().keys()):
        module, _, name = tensor.rpartition(".")
        if module in packed and name != "bias":
            yield Problem(file_of[tensor], tensor, "does not belong to this linear")


def _linear_problems(
    tensors: Mapping[str, Tensor], file_of: Mapping[str, str], layout: ModelLayout
) -> Iterator[Problem]:
    for name, spec in layout.modules.items():
        full = {tensor: f"{name}.{tensor}" for tensor in spec.layout.specs()}
        if spec.columns_from is not None:
            full[COLUMN_TYPES] = f"{spec.columns_from}.{COLUMN_TYPES}"
        stored = {tensor: tensors[path] for tensor, path in full.items() if path in tensors}
        for tensor, what in problems(spec.layout, stored):
            yield Problem(file_of[full[tensor]], full[tensor], what)


def _checksum_problems(
    tensors: Mapping[str, Tensor], file_of: Mapping[str, str], home: str, checksums: Checksums
) -> Iterator[Problem]:
    for tensor in sorted(tensors.keys() | checksums.keys()):
        file = file_of.get(tensor, home)
        if tensor not in tensors:
            yield Problem(file, tensor, "is missing")
        elif tensor not in checksums:
            yield Problem(file, tensor, f"is not in {CHECKSUMS}")
        elif checksums[tensor] != tensor_checksum(tensors[tensor]):
            yield Problem(file, tensor, f"is not as it was saved (its sha256 is not the one in {CHECKSUMS})")
