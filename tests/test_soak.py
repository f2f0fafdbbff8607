"""Runs that are killed, or that find the disk full or read-only: nothing is lost, the same command continues."""

import os
import resource
import subprocess
import sys
from subprocess import CompletedProcess

import pytest
import torch
from soak import SETTINGS, contents, make_model, soak
from together import exit_code

import ptq161
from ptq161 import cli, pipeline


@pytest.mark.slow
def test_runs_killed_at_random_moments_continue_to_the_same_bytes(tmp_path):
    rows = soak(tmp_path, kills=5, seed=1)
    assert len(rows) == 5
    assert any(row["work"] for row in rows), "no kill came while there was work in progress"


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path)
    return tmp_path


def command(arguments, limit, printed):
    """What the process of `run_in_process` does; what it prints goes to two files."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    torch.set_num_threads(1)
    sys.exit(cli.main(arguments))


def run_in_process(folder, out, limit=None):
    """The command in a process of its own, which cannot write beyond `limit` bytes of a file."""
    arguments = ["quantize", str(folder / "model"), str(out), *ARGUMENTS, str(folder / "text.txt")]
    code = exit_code(command, arguments, limit, folder)
    return CompletedProcess(arguments, code, *((folder / name).read_text() for name in ("stdout", "stderr")))


ARGUMENTS = ["--quiet", "--preset", "best", "--samples", "3", "--seqlen", "16", "--bits", "3.0", "--epochs", "1"]
for key in ("distill_tokens", "distill_lr_latent", "distill_lr_scale"):
    ARGUMENTS += ["--set", f"{key}={SETTINGS[key]}"]
ARGUMENTS.append("--calib")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4_000, 30_000, 60_000])
def test_files_that_cannot_grow_are_a_clear_line_and_the_run_continues(limit, model, tmp_path):
    """RLIMIT_FSIZE stands for a full disk: writing beyond it fails with an error from the system."""
    done = run_in_process(model, tmp_path / "out", limit)
    assert done.returncode == 1 and done.stdout == ""
    assert "ptq161: error: cannot write below" in done.stderr.splitlines()[-1]
    assert "the same command continues" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    done = run_in_process(model, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert run_in_process(model, tmp_path / "whole").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture
def mounted(tmp_path):
    """Options -> a small disk in memory mounted with them; skips where mounting is not allowed."""
    mounts = []

    def mount(options):
        place = tmp_path / f"disk-{len(mounts)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting is not allowed here")
        mounts.append(place)
        return place

    yield mount
    for place in mounts:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_read_only_disk_is_refused_at_once(model, mounted):
    done = run_in_process(model, mounted("ro") / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("ptq161: error: cannot write to")


@pytest.mark.slow
def test_full_disk_keeps_the_finished_blocks(model, mounted, monkeypatch):
    disk = mounted("size=400k")
    filler = disk / "filler"
    settings = SETTINGS | {"calib": str(model / "text.txt")}
    monkeypatch.setattr(pipeline, "check_disk", lambda out, needed: None)  # which would see it coming

    def fill(progress):
        if (progress.block, progress.phase) == (2, "learn") and not filler.exists():
            with filler.open("wb") as file:
                while True:
                    try:
                        file.write(bytes(4096))
                        file.flush()
                    except OSError:
                        return

    with pytest.raises(ptq161.Ptq161Error, match=r"No space left on device.*the same command continues"):
        pipeline.quantize(model / "model", disk / "out", on_progress=fill, **settings)
    kept = {path.name for path in (disk / "out.partial").glob("block-*.json")}
    assert {"block-00000.json", "block-00001.json"} <= kept
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    seen = []
    pipeline.quantize(model / "model", disk / "out", on_progress=seen.append, **settings)
    assert min(progress.block for progress in seen) >= 2
    pipeline.quantize(model / "model", model / "whole", **settings)
    assert contents(disk / "out") == contents(model / "whole")
