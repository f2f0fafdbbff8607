"""Run ptq161 commands one after another, show each so that it can be repeated by hand, and remember their results."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ptq161


class StepFailed(Exception):
    """A command ended with an error that it has already printed; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


class Steps:
    """Results by command, kept in one JSON file. A result counts as long as command, version and files are the same."""

    def __init__(self, record: Path) -> None:
        self.record = record
        self.results: dict[str, dict[str, Any]] = json.loads(record.read_text()) if record.exists() else {}
        self.commands: list[str] = []

    def run(self, title: str, arguments: Sequence[str], *, reads: Sequence[Path], writes: Path | None = None) -> Any:
        """The JSON of `ptq161 ARGUMENTS --json`, from the record if it is still good. Raises StepFailed."""
        command = shlex.join(["ptq161", *arguments])
        self.commands.append(command)
        print(f"\n=== {title}\n$ {command}", flush=True)

        def ask() -> Any:
            stale = []
            if writes is not None and writes.exists():
                print(f"  {writes} is there, but of another command or version: replaced (--overwrite)", flush=True)
                stale = ["--overwrite"]
            process = subprocess.run(
                [sys.executable, "-m", "ptq161", *arguments, *stale, "--json"], stdout=subprocess.PIPE, text=True
            )
            if process.returncode != 0:
                raise StepFailed(process.returncode)
            return json.loads(process.stdout)

        return self._remembered(command, ask, reads, writes)

    def compute(self, title: str, function: Callable[[], Any], *, reads: Sequence[Path]) -> Any:
        """What `function` returns, for a step that is no command."""
        print(f"\n=== {title}", flush=True)
        return self._remembered(title, function, reads, None)

    def _remembered(self, key: str, function: Callable[[], Any], reads: Sequence[Path], writes: Path | None) -> Any:
        files = [*reads, *([writes] if writes is not None else [])]
        known = self.results.get(key)
        if known is not None and known["version"] == ptq161.__version__ and known["files"] == _stamp(files):
            print("  nothing has changed since this was done: its result is used again", flush=True)
            return known["result"]
        began = time.monotonic()
        result = function()
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
        self.results[key] = {"version": ptq161.__version__, "files": _stamp(files), "result": result}
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        return result


def _stamp(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Size and time of the last change of every file: equal as long as nothing was written."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.exists()]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
