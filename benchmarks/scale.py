"""How time and memory of a run grow, measured on small random models; and what follows for large ones, computed.

    .venv/bin/python benchmarks/scale.py measure --work DIR > benchmarks/results/scale.jsonl
    .venv/bin/python benchmarks/scale.py plot benchmarks/results/scale.jsonl docs/scale.svg
    .venv/bin/python benchmarks/scale.py table benchmarks/results/scale.jsonl

`measure` quantizes random LLaMA-shaped models (hidden 512, MLP 1408, bfloat16) of more and more blocks, and one with
more and more calibration tokens: preset fast, one epoch, seed 0, widths divided without the Fisher pass, one thread.
Time is processor time, which other programs hardly lengthen; memory is the peak of anonymous memory. `table` computes
memory and disk of larger models as `--dry-run` does, and scales measured time by weights, and by weights times tokens.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from large_model import folder_of, make_model, status

HIDDEN, INNER = 512, 1408
BLOCK_WEIGHTS = 4 * HIDDEN**2 + 3 * HIDDEN * INNER
SEQLEN = 64
RUNS = [(blocks, 4) for blocks in (2, 4, 8, 16)] + [(4, samples) for samples in (8, 16, 32, 64)]
FLOPS_PER_SECOND = 100e12  # assumed, of one GPU: nobody has measured this package on one

# name -> vocabulary, hidden, MLP, blocks, heads, key-value heads
MODELS = {
    "7B": (32_000, 4096, 11_008, 32, 32, 32),
    "70B": (32_000, 8192, 28_672, 80, 64, 8),
    "405B": (128_256, 16_384, 53_248, 126, 128, 8),
}


def main() -> None:
    """Measure, plot or compute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--work", type=Path, required=True, help="folder for models and results")
    measuring.add_argument("--run", type=int, nargs=2, help=argparse.SUPPRESS)
    plotting = commands.add_parser("plot")
    plotting.add_argument("rows", type=Path)
    plotting.add_argument("figure", type=Path)
    commands.add_parser("table").add_argument("rows", type=Path)
    args = parser.parse_args()
    if args.command == "measure":
        measure(args.work, args.run)
        return
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    if args.command == "plot":
        plot(rows, args.figure)
    else:
        table(rows)


def measure(work: Path, run: list[int] | None) -> None:
    """Print one row per run, each in a process of its own."""
    if run is not None:
        print(json.dumps(quantize(work, *run)))
        return
    for blocks, samples in RUNS:
        folder = folder_of(Namespace(work=work, hidden=HIDDEN), blocks)
        make_model(folder, HIDDEN, INNER, blocks)
        command = [sys.executable, __file__, "measure", "--work", str(work), "--run", str(blocks), str(samples)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout.splitlines()[-1], flush=True)


def quantize(work: Path, blocks: int, samples: int) -> dict[str, Any]:
    """One run, its processor time from the first block on, and its peak of anonymous memory."""
    import torch

    from ptq161 import pipeline

    torch.set_num_threads(1)
    folder, out = folder_of(Namespace(work=work, hidden=HIDDEN), blocks), work / "packed"
    shutil.rmtree(out, ignore_errors=True)
    settings: dict[str, Any] = {"preset": "fast", "calib": str(folder / "text.txt"), "epochs": 1, "samples": samples}
    settings |= {"seqlen": SEQLEN, "allocation": "uniform"}
    predicted = pipeline.plan(folder, **settings)["peak_memory_bytes"]
    peak, began, finished = 0, 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(0.01):
            peak = max(peak, status()["RssAnon"])

    def on_progress(progress: pipeline.Progress) -> None:
        nonlocal began
        began = began or time.process_time()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = pipeline.quantize(folder, out, restart=True, on_progress=on_progress, **settings)
    finally:
        finished.set()
        watcher.join()
    return {
        "blocks": blocks,
        "tokens": samples * SEQLEN,
        "weights": result["quantized_weights"],
        "cpu_seconds": time.process_time() - began,
        "anonymous_bytes": peak,
        "predicted_bytes": predicted,
    }


def fitted(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """CPU seconds per weight, and per weight and token, by least squares over all rows."""
    import numpy

    factors = numpy.array([[row["weights"], row["weights"] * row["tokens"]] for row in rows], dtype=float)
    seconds = numpy.array([row["cpu_seconds"] for row in rows])
    (per_weight, per_token), *_ = numpy.linalg.lstsq(factors, seconds, rcond=None)
    return float(per_weight), float(per_token)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over blocks, and over calibration tokens."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from ptq161.report.palette import STYLE, colour

    tokens = min(row["tokens"] for row in rows)
    blocks = next(row["blocks"] for row in rows if row["tokens"] > tokens)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        panels = figure.subplots(2, 2, sharey="row")
        for column, (key, kept, label) in enumerate(
            [
                ("blocks", ("tokens", tokens), f"decoder blocks ({tokens} tokens)"),
                ("tokens", ("blocks", blocks), f"calibration tokens ({blocks} blocks)"),
            ]
        ):
            shown = sorted((row for row in rows if row[kept[0]] == kept[1]), key=lambda row: row[key])
            x = [row[key] for row in shown]
            seconds, memory = panels[0, column], panels[1, column]
            seconds.plot(x, [row["cpu_seconds"] for row in shown], "o-", color=colour("sign"))
            memory.plot(x, [row["anonymous_bytes"] / 1e6 for row in shown], "o-", color=colour("sign"), label="seen")
            memory.plot(
                x, [row["predicted_bytes"] / 1e6 for row in shown], "s--", color=colour("other"), label="predicted"
            )
            memory.set_xlabel(label)
            for axes in (seconds, memory):
                axes.set_xlim(left=0)
                axes.grid(axis="y")
        panels[0, 0].set_ylim(0, 1.1 * max(row["cpu_seconds"] for row in rows))
        panels[1, 0].set_ylim(0, 1.1e-6 * max(max(row["anonymous_bytes"], row["predicted_bytes"]) for row in rows))
        panels[0, 0].set_ylabel("CPU seconds, one thread")
        panels[1, 0].set_ylabel("peak anonymous memory, MB")
        panels[1, 0].legend(loc="lower right")
        figure.savefig(path, metadata={"Date": None})


def table(rows: list[dict[str, Any]]) -> None:
    """Print one Markdown table: presets fast (also what best does block by block) and paper for each large model."""
    from ptq161 import preflight
    from ptq161.config import preset_named

    per_weight, per_token = fitted(rows)
    print(f"CPU seconds = weights * ({per_weight:.3g} + {per_token:.3g} * tokens), one epoch\n")
    print("| model | preset | tokens | one block | streams | disk | operations | GPU hours | CPU hours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, sizes in MODELS.items():
        for preset in ("fast", "paper"):
            chosen = preset_named(preset)
            config, shape = chosen.quant, (chosen.calibration.samples, chosen.calibration.seqlen)
            prepared = prepared_for(sizes, config)
            block = preflight.BYTES_PER_WEIGHT * sum(p.numel() for p in prepared.model.blocks[0].parameters())
            streams = 5 * preflight.stream_bytes(prepared, shape)
            disk = preflight.work_bytes(prepared, shape, config, offloaded=False) + packed_bytes(prepared)
            work, tokens = preflight.flops(prepared, shape, config), shape[0] * shape[1]
            # An epoch is three of the seven passes that were measured: see preflight.flops.
            passes = (4 + 3 * config.epochs) / (4 + 3)
            hours = prepared.layout.quantized_weights * (per_weight + per_token * tokens * passes) / 3600
            print(
                f"| {name} | {preset} | {tokens:,} | {block / 1e9:.1f} GB | {streams / 1e9:.1f} GB "
                f"| {disk / 1e9:.0f} GB | {work:.1e} | {work / FLOPS_PER_SECOND / 3600:.2g} | {hours:,.0f} |"
            )


def prepared_for(sizes: tuple[int, ...], config: Any) -> Any:
    """What `walk.prepare` would give for a Llama of these sizes, without its weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ptq161.allocation import LAYOUTS
    from ptq161.dense import DenseModel
    from ptq161.discovery import Trace, config_shapes
    from ptq161.walk import Prepared

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    llama = LlamaConfig(**dict(zip((*names, "num_key_value_heads"), sizes, strict=True)))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(llama, dtype=torch.bfloat16)
    model = DenseModel(skeleton, {}, torch.bfloat16, resident=False)
    shapes = config_shapes(llama)
    if config.method == "mixed":  # about as many bits, and no search over hundreds of large linears
        config = config.replaced({"bits": None, "salient_ratio": 0.05})
    layout = LAYOUTS[config.method](shapes, config, None)
    return Prepared(model, Trace([], []), 0, sizes[3], shapes, layout, 0)


def packed_bytes(prepared: Any) -> int:
    """The finished checkpoint: packed linears, and all else at 16 bits."""
    from ptq161.tuning import outside_weights

    return int(sum(prepared.layout.parts().values()) + 2 * outside_weights(prepared.model))


if __name__ == "__main__":
    main()
