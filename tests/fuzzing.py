"""The fuzzer: mutants of packed checkpoints, settings and texts, each put through every door that reads such a file.

A mutant is a number: (seed, number) decides what is changed and how. Mutants are judged in a child process with a limit
on its memory; the parent watches for silence (a hang) and for the child's end (a crash), and goes on with the next one.
`python tests/fuzzing.py SEED FIRST LAST FOLDER` is such a child.
"""

import faulthandler
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import mutants
from mutants import CHECKSUMS, CONFIG, INDEX, MARKER
from text_mutants import RANGES, TEXT_MUTATORS, write_texts

HEADROOM = 3 * 2**28  # bytes of address space that a mutant may take beyond what sound files take
PATIENCE = 60.0  # seconds of silence that count as a hang; a mutant takes a fraction of one
TEXTS = "texts"
SUBJECTS = {
    "paper": ("llama-tied", 2**30),
    "paper-shards": ("opt", 6000),
    "mixed": ("qwen3", 2**30),
    "mixed-shards": ("llama", 6000),
}
JSON_MUTATORS = [mutants.edit_json] * 6 + [
    mutants.duplicate_key,
    mutants.raw_json,
    mutants.cut,
    mutants.flip_bits,
    mutants.replace_file,
]
WEIGHT_MUTATORS = [mutants.edit_header] * 5 + [mutants.edit_tensor] * 3 + [
    mutants.edit_length, mutants.flip_bits, mutants.flip_bits, mutants.cut, mutants.replace_file,
]  # fmt: skip


@dataclass
class Outcome:
    """One mutant: what was done, what each door said (refused, loaded, ...), and what is wrong with that."""

    number: int
    file: str
    did: str
    doors: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def choose(seed: int, number: int, subjects: list[str]) -> tuple[Random, str]:
    """The mutant's source of chance and its subject; every eighth is a text."""
    rng = Random(f"{seed}/{number}")
    return rng, TEXTS if number % 8 == 7 else subjects[number % len(subjects)]


def mutate(rng: Random, folder: Path) -> tuple[str, str]:
    """Change a packed checkpoint once (or, one time in ten, twice); returns file and what was done."""
    files, did = [], []
    for _ in range(1 if rng.random() < 0.9 else 2):
        weights = sorted(path.name for path in folder.glob("*.safetensors"))
        kinds = ["config"] * 4 + ["fields", "weights", "weights", "weights", "weights", "folder", "folder"]
        kinds += ["json"] * 3 + ["shards"] * 2 * (len(weights) > 1)
        match rng.choice(kinds):
            case "config":
                name, mutator = CONFIG, rng.choice(JSON_MUTATORS)
            case "fields":
                name, mutator = CONFIG, mutants.add_fields
            case "json":
                names = [n for n in sorted(os.listdir(folder)) if n.endswith(".json") and n != CONFIG]
                name, mutator = rng.choice(names), rng.choice(JSON_MUTATORS)
            case "weights" if weights:
                name, mutator = rng.choice(weights), rng.choice(WEIGHT_MUTATORS)
            case "shards" if (folder / INDEX).exists():
                name, mutator = "", mutants.swap_shards
            case _:
                name, mutator = "", mutants.add_file
        try:
            if not (folder / name).is_file() and name:
                raise OSError("an earlier change left a pipe, a folder or a broken link there")
            did.append(f"{mutator.__name__}: {mutator(rng, folder / name)}")
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            if not did:
                raise
            did.append(f"{mutator.__name__}: not possible any more")
        files.append(name or "folder")
    return " + ".join(files), " + ".join(did)


# In the child: the doors and what is right


def message_problem(error: Exception) -> str | None:
    """Why this is no clear message of one line."""
    text = str(error)
    if not text.strip() or len(text) > 1000:
        return f"message of {len(text)} characters: {text[:200]!r}"
    return None if text.isprintable() else f"message that is not one printable line: {text[:300]!r}"


def through(outcome: Outcome, door: str, opened: Callable[[], Any], *, foreign: bool = False) -> Any:
    """What the door gives, or None after noting how it refused. foreign: transformers itself stands at the door."""
    import ptq161
    from ptq161.errors import InputError

    try:
        result = opened()
    except InputError as error:
        outcome.doors[door] = "refused"
        if problem := message_problem(error):
            outcome.failures.append(f"{door}: {problem}")
        if "allocate" in str(error) and "pyarrow" not in door:
            outcome.failures.append(f"{door}: tried to allocate: {error}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-6:]]
        # A from_pretrained of transformers reads config.json before it asks us; what it says to that is its own.
        ours = Path(ptq161.__file__).parent  # a clone's folder has the same name, and transformers may lie in it
        own = not Path(frames[-1].filename).is_relative_to(ours) and isinstance(error, Exception)
        memory = isinstance(error, MemoryError) or "allocate" in str(error)
        if foreign and own and (not memory or where[-1].startswith("configuration_")):
            outcome.doors[door] = "refused by transformers"
            return None
        outcome.doors[door] = "unclear"
        outcome.failures.append(f"{door}: {type(error).__name__}: {str(error)[:200]!r} at {' '.join(where)}")
    else:
        outcome.doors[door] = "loaded"
        return result
    return None


@dataclass(frozen=True)
class Sound:
    """What a subject holds when nothing has happened to it."""

    folder: Path
    config: bytes
    tensors: dict[str, Any]
    logits: Any


class Judge:
    """Puts one mutant after the other through the doors. Lives in the child; imports torch."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(1)
        self.work = folder / f"mutant-{os.getpid()}"
        self.texts = folder / TEXTS
        self.tokens = torch.arange(3, 9)[None]
        self.sound = {path.name: self._sound(path) for path in sorted(folder.iterdir()) if (path / CONFIG).exists()}
        self._read_texts(Outcome(-1, "", ""), self.texts, "settings.toml", "")
        self._read_texts(Outcome(-1, "", ""), self.texts, "calibration.parquet", "")

    def _sound(self, folder: Path) -> Sound:
        import torch

        outcome = Outcome(-1, "", "")
        model = through(outcome, "load", lambda: _load(folder))
        if model is None:
            raise AssertionError(f"{folder} does not load: {outcome}")
        with torch.no_grad():  # as mutants are run: gradients take other kernels, which round otherwise
            logits = model(self.tokens).logits
        return Sound(folder, (folder / CONFIG).read_bytes(), _stored(folder), logits)

    def judge(self, seed: int, number: int) -> Outcome:
        """Make the mutant, and say how the doors took it."""
        rng, subject = choose(seed, number, sorted(self.sound))
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        folder = self.work / subject
        shutil.copytree(self.texts if subject == TEXTS else self.sound[subject].folder, folder)
        os.chdir(self.work)
        if subject == TEXTS:
            name = rng.choice(sorted(TEXT_MUTATORS))
            mutator = rng.choice(TEXT_MUTATORS[name])
            outcome = Outcome(number, name, f"{mutator.__name__}: {mutator(rng, folder / name)}")
            self._read_texts(outcome, folder, name, rng.choice(RANGES))
        else:
            file, did = mutate(rng, folder)
            outcome = Outcome(number, f"{subject}/{file}", did)
            self._open_packed(outcome, folder, self.sound[subject], number)
        if any(self.work.rglob(MARKER)):
            outcome.failures.append("code of the checkpoint was run")
        return outcome

    def _open_packed(self, outcome: Outcome, folder: Path, sound: Sound, number: int) -> None:
        from transformers import AutoModelForCausalLM

        from ptq161 import inspection, sources, verify

        checked = through(outcome, "verify", lambda: verify.verify(folder))
        if checked is not None:
            outcome.doors["verify"] = "sound" if checked["ok"] else "refused"
            for problem in checked["problems"]:
                if bad := message_problem(ValueError(f"{problem['file']} {problem['tensor']} {problem['what']}")):
                    outcome.failures.append(f"verify: {bad}")
        sound_folder = checked is not None and checked["ok"]
        doors: dict[str, Callable[[], Any]] = {}
        model_loaded: Any = None
        if sound_folder or number % 5 == 0:  # what verify refuses, load refuses by the same function
            doors["load"] = lambda: _load(folder)
        if number % 4 == 0:
            doors["from_pretrained"] = lambda: _exact(AutoModelForCausalLM.from_pretrained(folder))
        for door, opened in doors.items():
            model = through(outcome, door, opened, foreign=door == "from_pretrained")
            model_loaded = model_loaded or model
            if model is not None:
                if not sound_folder:
                    outcome.failures.append(f"{door}: opens what verify refuses")
                self._check_values(outcome, door, model, folder, sound)
        if number % 4 == 1:
            through(outcome, "inspect", lambda: inspection.inspect(folder))
        if "generation" in outcome.file and model_loaded is not None:
            through(outcome, "generate", lambda: _generate(model_loaded))
        if "token" in outcome.file or "added_tokens" in outcome.did or number % 16 == 0:
            through(outcome, "open_model", lambda: sources.open_model(folder))

    def _check_values(self, outcome: Outcome, door: str, model: Any, folder: Path, sound: Sound) -> None:
        """The model holds what the files hold; with checksums that is what was saved, and it computes the same."""
        import torch

        try:
            stored, state = _stored(folder), model.state_dict()
        except Exception as error:
            outcome.failures.append(f"{door}: loaded from files that safetensors cannot read: {error}")
            return
        held = {state[name].data_ptr() for name in stored.keys() & state.keys()}
        ignored = stored.keys() - state.keys()
        made_up = {n for n, tensor in state.items() if n not in stored and tensor.data_ptr() not in held}
        other = {n for n in stored.keys() & state.keys() if not _same(state[n], stored[n].to(state[n].dtype))}
        changed = set()
        if (sound.folder / CHECKSUMS).exists():
            names = stored.keys() | sound.tensors.keys()
            changed = {n for n in names if not _same(stored.get(n), sound.tensors.get(n))}
        for what, wrong in (("ignored", ignored), ("made up", made_up), ("misread", other), ("took changed", changed)):
            if wrong:
                outcome.failures.append(f"{door}: {what} {sorted(wrong)[:3]} ({len(wrong)} tensors)")
        try:
            with torch.no_grad():
                logits = model(self.tokens).logits
        except Exception as error:
            outcome.failures.append(f"{door}: loaded but cannot run: {type(error).__name__}: {str(error)[:150]!r}")
            return
        same = _same_files(folder, sound)
        if same and not torch.equal(logits, sound.logits):
            outcome.failures.append(f"{door}: computes something else")

    def _read_texts(self, outcome: Outcome, folder: Path, name: str, bounds: str) -> None:
        from ptq161 import arguments, config, data, options
        from ptq161.hub import Split

        path = folder / name
        if name == "settings.toml":
            args = arguments.parse(["quantize", "model", "out", "--config", str(path)])

            def settings() -> Any:
                keywords = options.quantize_settings(args)
                fields = config.QuantConfig.__dataclass_fields__.keys() & keywords.keys()
                return config.PRESETS["fast"].quant.replaced({key: keywords[key] for key in fields})

            through(outcome, "settings", settings)
            return
        outcome.did += f" range {bounds[:20]}"
        source = f"{path}{bounds}"
        text = through(outcome, "calibration", lambda: data.read_text(data.parse_source(source), Split.CALIBRATION))
        if text is not None:
            text.encode("utf-8")
            if name.endswith(".txt") and not bounds and text.encode() != path.read_bytes():
                outcome.failures.append("calibration: text is not the file's")


def _load(folder: Path) -> Any:
    import ptq161

    return ptq161.load(folder, mode="packed", activations="float32")


def _generate(model: Any) -> Any:
    from conftest import make_tokenizer

    from ptq161 import generation

    tokenizer = make_tokenizer()
    prompt = tokenizer("The river")["input_ids"]
    return generation.stream(model, tokenizer, prompt, generation.Sampling(max_new_tokens=2))


def _exact(model: Any) -> Any:
    """With float32 activations, as `_load` asks for."""
    for module in model.modules():
        if hasattr(module, "exact"):
            module.exact = True
    return model


def _stored(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    stored: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    return stored


def _same(first: Any, second: Any) -> bool:
    """Bit for bit, so that NaN equals itself."""
    import torch

    if first is None or second is None or first.dtype != second.dtype or first.shape != second.shape:
        return False
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*bits)


def _same_files(folder: Path, sound: Sound) -> bool:
    tensors = _stored(folder)
    same = tensors.keys() == sound.tensors.keys() and all(_same(tensors[n], sound.tensors[n]) for n in tensors)
    return same and (folder / CONFIG).read_bytes() == sound.config


def _address_space() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmSize"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmSize in /proc/self/status")


def child(seed: int, first: int, last: int, folder: Path) -> None:
    """Judge the mutants first..last-1, one line of JSON for each on stdout."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, too
    judge = Judge(folder)
    limit = _address_space() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for number in range(first, last):
        began = time.monotonic()
        faulthandler.dump_traceback_later(PATIENCE * 0.8)
        outcome = judge.judge(seed, number)
        outcome.seconds = time.monotonic() - began
        print(json.dumps(vars(outcome)), file=answers, flush=True)
    shutil.rmtree(judge.work, ignore_errors=True)


# In the parent


def make_subjects(folder: Path) -> Path:
    """Sound packed checkpoints, each with checksums and without, and sound texts."""
    from conftest import make_tokenizer
    from packed import write_packed

    for name, (family, shard_bytes) in SUBJECTS.items():
        mixed = name.startswith("mixed")
        write_packed(folder / name, family, mixed=mixed, tokenizer=make_tokenizer(), shard_bytes=shard_bytes, layers=1)
        bare = Path(shutil.copytree(folder / name, folder / f"{name}-bare"))
        (bare / CHECKSUMS).unlink()
        text = (bare / CONFIG).read_text()
        (bare / CONFIG).write_text(text.replace('"checksums": true', '"checksums": false'))
    write_texts(folder / TEXTS)
    return folder


def run(folder: Path, seed: int, first: int, last: int) -> Iterator[Outcome]:
    """Outcomes of the mutants first..last-1 over the subjects in `folder`; a dead or silent child is one, too."""
    while first < last:
        command = [sys.executable, __file__, str(seed), str(first), str(last), str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
        ):
            ready = False
            while line := _next_line(process, PATIENCE if ready else 10 * PATIENCE):
                entry = json.loads(line)
                if "ready" in entry:
                    ready = True
                    continue
                first = entry["number"] + 1
                yield Outcome(**entry)
            hung = ready and _alive(process)
            process.kill()
            process.wait()
            errors.seek(0)
            said = errors.read()[-1500:].decode(errors="replace")
        if not ready:
            raise RuntimeError(f"the fuzzer's child did not start: {said}")
        if first < last:
            what = "hang" if hung else f"the process ended with {process.returncode}"
            yield Outcome(first, "?", "?", failures=[f"{what}: {said}"])
            first += 1


def _alive(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        return True
    return False


def _next_line(process: subprocess.Popen[bytes], patience: float) -> bytes:
    """The child's next line; empty at its end or after too long a silence."""
    assert process.stdout is not None
    line = b""
    deadline = time.monotonic() + patience
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            return b""
        read = os.read(process.stdout.fileno(), 1)
        if not read:
            return b""
        line += read
    return line


if __name__ == "__main__":
    child(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
