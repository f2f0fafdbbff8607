"""Kill a run at random moments and let the same command go on: the result must be the same to the byte.

.venv/bin/python tests/soak.py --kills 30        (make soak)

A tiny Llama of four blocks goes through all stages: widths measured, blocks learned, distilled, packed. Each time the
process gets SIGKILL after a random part of the time that an uninterrupted run takes.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from together import ready_processes

SETTINGS: dict[str, Any] = {
    "preset": "best",
    "samples": 3,
    "seqlen": 16,
    "bits": 3.0,
    "epochs": 1,
    "distill_tokens": 4 * 32,
    "distill_lr_latent": 1e-2,
    "distill_lr_scale": 5e-3,
}


def make_model(folder: Path) -> None:
    """A tiny Llama in several shards, with its tokenizer, and text beside it."""
    from conftest import make_text, make_tokenizer
    from families import FAMILIES, build

    config = FAMILIES["llama"]()
    config.num_hidden_layers = 4
    build(config).bfloat16().save_pretrained(folder / "model", max_shard_size="20KB")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(make_text(0, 3000), encoding="utf-8")


def quantize(folder: Path, out: Path) -> None:
    """The command: in a process of its own, saving distillation after every step."""
    import torch

    from ptq161 import distill, pipeline

    torch.set_num_threads(1)
    distill.SECONDS_BETWEEN_SAVES = 0.0
    pipeline.quantize(folder / "model", out, calib=str(folder / "text.txt"), **SETTINGS)


def contents(out: Path) -> dict[str, Any]:
    """Every file as bytes, what run.json says about time left out."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in out.iterdir()}
    files["run.json"] = json.loads(files["run.json"]) | {"timing": None}
    return files


def soak(folder: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """Kill and continue `kills` runs. Returns for each when it was killed (share of a run) and what was there then.

    Raises AssertionError if a continued run fails or gives other bytes.
    """
    processes = ready_processes()
    make_model(folder)

    def start(out: Path) -> Any:
        process = processes.Process(target=quantize, args=(folder, out))
        process.start()
        return process

    start(folder / "warm-up").join()  # starts the server, which imports everything once
    began = time.monotonic()
    whole = start(folder / "whole")
    whole.join()
    duration = time.monotonic() - began
    assert whole.exitcode == 0
    expected, source, rows = contents(folder / "whole"), random.Random(seed), []
    for number in range(kills):
        out, share = folder / f"out-{number}", source.random()
        process = start(out)
        time.sleep(share * duration)
        process.kill()
        process.join()
        work = folder / f"out-{number}.partial"
        row = {"share": share, "work": sorted(path.name for path in work.iterdir()) if work.exists() else []}
        finished = out.exists() and not work.exists()
        if not finished:
            process = start(out)
            process.join()
            # A kill after OUT appeared leaves only the cleaning up, after which OUT is in the way as ever.
            assert process.exitcode == 0 or "published" in row["work"], row
        found = contents(out)
        assert found.keys() == expected.keys(), row
        assert [name for name in found if found[name] != expected[name]] == [], row
        assert not work.exists(), row
        rows.append(row | {"finished before": finished})
        shutil.rmtree(out)
    return rows


def main() -> None:
    """Soak in a temporary folder and print one line per kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(Path(folder), arguments.kills, arguments.seed)
    for row in rows:
        print(json.dumps(row))
    print(f"{len(rows)} killed runs continued to the same bytes")


if __name__ == "__main__":
    main()
