"""Work in progress on disk: `OUT.partial` beside OUT, one file per finished block, the streams, a lock.

Every file appears by write, fsync, rename, so that whatever kills the process leaves either the old file or the new
one. The finished folder replaces OUT in one rename. Of several ranks, the first does all of that, but each keeps its
own streams.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptq161 import ranks
from ptq161.binarize import CODE_WIDTHS
from ptq161.blocks import Streams
from ptq161.dense import Place, StoredTensors
from ptq161.errors import InputError
from ptq161.latent import LatentWeight
from ptq161.layout import ModelLayout
from ptq161.space import Space


class WorkFolder:
    """`OUT.partial`: what a run has finished so far, and under which settings."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self.result = self.path / "result"

    @contextmanager
    def open(self, job: Mapping[str, Any], *, restart: bool) -> Iterator[None]:
        """Take the folder for this job: start it, or continue one with the same settings. Rank 0 takes it for all.

        Raises InputError if another process holds it, or if it belongs to different settings (naming what differs).
        """
        with ExitStack() as held:
            ranks.from_first(lambda: self._take(held, job, restart=restart))
            yield

    def _take(self, held: ExitStack, job: Mapping[str, Any], *, restart: bool) -> None:
        """Lock the folder for as long as `held` is open, and put it under the job's name or check that it is."""
        existed = self.path.exists()
        held.enter_context(locked(self.path, f"another process is quantizing into {self.out}"))
        if restart and self._job.exists():
            self._clear()
        self._claim(json.loads(json.dumps(job)), existed)

    def _claim(self, job: dict[str, Any], existed: bool) -> None:
        if self._job.exists():
            shown = differences(json.loads(self._job.read_text()), job)
            if shown:
                raise InputError(
                    f"{self.path} holds an unfinished run with other settings ({shown}); repeat those settings to "
                    "continue it, or give --restart to drop it"
                )
        elif existed and not {entry.name for entry in self.path.iterdir()} <= {"lock", "job.json.new"}:
            raise InputError(f"{self.path} exists and is not an unfinished run of ptq161; move it away")
        else:
            try:
                write_atomically(self._job, lambda target: target.write_text(json.dumps(job, indent=2)))
            except OSError as error:
                raise InputError(f"cannot write to {self.path}: {error.strerror}") from error

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def save_block(self, index: int, packed: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep one finished block: its packed tensors by full name, and its JSON record."""
        write_atomically(self._block(index), lambda path: save_file(dict(packed), path))
        write_atomically(self._record(index), lambda path: path.write_text(json.dumps(record)))

    def save_latents(self, index: int, latents: Mapping[str, LatentWeight]) -> None:
        """Keep what one finished block's codes were rounded from, for tuning the whole model afterwards."""
        tensors = {}
        for name, weight in latents.items():
            tensors[f"{name}.columns"] = weight.columns.cpu()
            tensors[f"{name}.latent"] = weight.latent.detach().cpu()
            tensors[f"{name}.scale"] = (weight.base * weight.gain).detach().cpu()
        write_atomically(self._latents(index), lambda path: save_file(tensors, path))

    def load_latents(self, layout: ModelLayout, first: int, last: int) -> dict[str, LatentWeight]:
        """The latents of the finished blocks first..last-1, by full name."""
        tensors: dict[str, Tensor] = {}
        for index in range(first, last):
            tensors |= load_file(self._latents(index))
        return {
            name: LatentWeight(
                columns=tensors[f"{name}.columns"],
                widths=tuple(CODE_WIDTHS[group.width] for group in spec.layout.groups),
                sizes=tuple(group.cols for group in spec.layout.groups),
                latent=tensors[f"{name}.latent"].clone().requires_grad_(),
                base=tensors[f"{name}.scale"],
                gain=torch.ones_like(tensors[f"{name}.scale"]).requires_grad_(),
            )
            for name, spec in layout.linears.items()
        }

    def save_distillation(self, state: Mapping[str, Tensor]) -> None:
        """Keep the state of tuning the whole model; from now on a continued run starts there."""
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        write_atomically(self._distillation, lambda path: save_file(contiguous, path))

    def load_distillation(self) -> dict[str, Tensor] | None:
        """The state of interrupted tuning, or None if it has not begun."""
        return load_file(self._distillation) if self._distillation.exists() else None

    def save_written(self, samples: Tensor) -> None:
        """Keep the text that the original wrote."""
        write_atomically(self._written, lambda path: save_file({"samples": samples}, path))

    def load_written(self) -> Tensor | None:
        """What `save_written` kept, or None."""
        return load_file(self._written)["samples"] if self._written.exists() else None

    def save_streams(self, streams: Streams) -> None:
        """Keep this rank's streams into the next block; once all ranks have, a continued run starts there."""
        tensors = {"full": streams.full.contiguous(), "quantized": streams.quantized.contiguous()}
        write_atomically(self._streams(streams.next_block), lambda path: save_file(tensors, path))
        ranks.gathered(streams.next_block)
        for before in self._saved_streams() - {streams.next_block}:
            self._streams(before).unlink()

    def load_streams(self, space: Space) -> Streams | None:
        """This rank's streams of an interrupted run, in `space`, or None at its start."""
        common = set.intersection(*ranks.gathered(self._saved_streams()))
        if not common:
            return None
        next_block = max(common)
        with safe_open(self._streams(next_block), framework="pt") as file:
            full, quantized = (space.copy(file.get_tensor(name)) for name in ("full", "quantized"))
        return Streams(next_block, full, quantized)

    def load_blocks(self, first: int, last: int) -> tuple[Mapping[str, Tensor], list[dict[str, Any]]]:
        """Packed tensors (read when asked for) and records of the finished blocks first..last-1."""
        places: dict[str, Place] = {}
        for index in range(first, last):
            with safe_open(self._block(index), framework="pt") as file:
                places |= {name: Place(self._block(index), name) for name in file.keys()}  # noqa: SIM118
        return StoredTensors(places), [json.loads(self._record(index).read_text()) for index in range(first, last)]

    def save_layout(self, layout: ModelLayout) -> None:
        """Keep how the bit budget was divided: it takes a backward pass through the whole model to find out."""
        write_atomically(self._layout, lambda path: path.write_text(json.dumps(layout.to_dict())))

    def load_layout(self) -> ModelLayout | None:
        """What `save_layout` kept, or None."""
        return ModelLayout.from_dict(json.loads(self._layout.read_text())) if self._layout.exists() else None

    def publish(self) -> None:
        """Put the finished `result` folder in OUT's place and drop the work; an old OUT goes last."""
        sync_folder(self.result)
        write_atomically(self._published, lambda path: path.write_text(""))
        self.complete()

    def complete(self) -> None:
        """Do what is left of a publication, if one was begun and cut off."""
        if not self._published.exists():
            return
        if self.result.exists():
            if self.out.exists():
                self.out.rename(self.path / "replaced")
            self.result.rename(self.out)
            sync(self.out.parent)
        for entry in self.path.iterdir():
            if entry != self._published:  # which goes last: without it, the rest would look like an unfinished run
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.rmtree(self.path)

    def _block(self, index: int) -> Path:
        return self.path / f"block-{index:05}.safetensors"

    def _record(self, index: int) -> Path:
        return self.path / f"block-{index:05}.json"

    def _latents(self, index: int) -> Path:
        return self.path / f"latents-{index:05}.safetensors"

    @property
    def _distillation(self) -> Path:
        return self.path / "distillation.safetensors"

    @property
    def _written(self) -> Path:
        return self.path / "written.safetensors"

    @property
    def _job(self) -> Path:
        return self.path / "job.json"

    @property
    def _published(self) -> Path:
        return self.path / "published"

    @property
    def _layout(self) -> Path:
        return self.path / "layout.json"

    def _streams(self, next_block: int) -> Path:
        return self.path / f"streams-{next_block:05}-{ranks.rank():05}.safetensors"

    def _saved_streams(self) -> set[int]:
        """The blocks into which this rank has its streams: two if not all ranks had theirs when the run ended."""
        files = self.path.glob(f"streams-*-{ranks.rank():05}.safetensors")
        return {int(path.name.split("-")[1]) for path in files}


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Make a folder and hold its lock. Raises InputError, saying `busy`, where another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{busy}; wait for it or stop it") from error
        yield


def differences(before: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """What two records of a job differ in, in words; empty where they are equal. Both as JSON gives them back."""
    old, new = _flat(before), _flat(job)
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return "; ".join(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in different)


def _flat(job: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of a nested table under their own names: config.epochs and the like."""
    flat: dict[str, Any] = {}
    for key, value in job.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` produce a temporary file beside `path`, then rename it into place; durable when this returns."""
    temporary = path.with_name(path.name + ".new")
    try:
        write(temporary)
        sync(temporary)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """fsync every file below a folder, and the folder."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an OUT that cannot be written, now rather than in two hours. Raises InputError."""
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; give another OUT, or --overwrite to replace it when the new one is complete")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder; the packed checkpoint needs a folder as OUT")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write to {parent}: no permission; choose another OUT")


def check_disk(out: Path, needed: int) -> None:
    """Raises InputError if the disk that will hold OUT has less than `needed` bytes free."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"the disk of {parent} has {free / 1e9:.2f} GB free, this run needs {needed / 1e9:.2f} GB; "
            "free some space or choose another OUT"
        )
