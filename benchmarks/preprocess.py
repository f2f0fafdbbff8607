"""What restorative LoRA is worth: perplexity, before and after quantizing, along one training run per variant.

    .venv/bin/python benchmarks/preprocess.py MODEL --text TEXT[0%:90%] --ppl TEXT[90%:] --out ROWS.jsonl --work DIR

Every variant starts from the same once-quantized model and sees the same samples in the same order. At the steps of
`--points` the adapters of the moment are merged and the result is quantized anew, with the settings of the first
quantization. Rows already in the output file are not computed again; adapters are kept in `--work`, so that a stopped
run continues. Whatever is evaluated computes in bfloat16. `--table ROWS.jsonl` prints a file of rows.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from ablations import install, stored_weights
from transformers import PreTrainedModel

from ptq161.adapters import concentration, target_linears
from ptq161.binarize import QuantizedWeight
from ptq161.config import CalibrationConfig, PreprocessConfig, preset_named
from ptq161.data import calibration_tokens, evaluation_tokens
from ptq161.dense import DenseModel
from ptq161.evaluate.perplexity import perplexity
from ptq161.restoration import Restoration
from ptq161.sources import open_dense
from ptq161.space import MEMORY
from ptq161.walk import allot, asks_for_harms, prepare, walk

# Name -> settings. Without adapters there are two rows, at step 0: `original`, and `requantized`, the once-quantized
# model quantized again.
VARIANTS: dict[str, dict[str, object]] = {
    "restorative": {"start": "quantized", "loss": "text"},
    "control": {"start": "original", "loss": "text"},
    "through-logits": {"start": "original", "loss": "logits", "through": True},
    "restorative-logits": {"start": "quantized", "loss": "logits"},
    "through-text": {"start": "original", "loss": "text", "through": True},
}
DEVICE = torch.device("cpu")


class Bench:
    """The model, its text, and what is computed once for all variants."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.source, self.tokenizer = open_dense(arguments.model)
        self.original = self.source.whole().float()
        names = [name for name, module in self.original.named_modules() if isinstance(module, torch.nn.Linear)]
        self.targets = target_linears([name for name in names if name.startswith(f"{self.source.prefix}.")], ())
        budget = {"bits": arguments.bits, "salient_ratio": arguments.salient_ratio}
        self.config = preset_named(arguments.preset).quant.replaced({"epochs": arguments.epochs, **budget})
        self.calibration = self.windows(arguments.samples, arguments.calib_seqlen)
        self.held_out = evaluation_tokens(arguments.ppl, self.tokenizer)

    def windows(self, count: int, seqlen: int) -> torch.Tensor:
        """Windows of the text, drawn by the seed."""
        settings = CalibrationConfig((self.arguments.text,), count, seqlen, self.arguments.seed)
        return calibration_tokens(settings, self.tokenizer, self.source.skeleton)

    def quantize(self, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, QuantizedWeight], float]:
        """The quantized model, dense; its linears as column groups; honest bits per weight."""
        prepared = prepare(DenseModel.of(model), self.calibration, self.config, None)
        if asks_for_harms(self.config):
            prepared = allot(prepared, self.calibration, self.config, DEVICE, MEMORY)
        result, grids = copy.deepcopy(model), {}
        for block in walk(prepared, self.calibration, self.config, DEVICE):
            install(result, prepared.layout, block)
            grids |= stored_weights(prepared.layout, block)
        return result, grids, prepared.layout.bits_per_weight

    @cached_property
    def once(self) -> tuple[PreTrainedModel, dict[str, QuantizedWeight], float]:
        """The once-quantized model, kept in `--work`."""
        path = self.arguments.work / "once.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.quantize(self.original), path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
        once: tuple[PreTrainedModel, dict[str, QuantizedWeight], float] = torch.load(path, weights_only=False)
        return once

    def measure(self, model: PreTrainedModel) -> float:
        """Held-out perplexity, computed in bfloat16."""
        rounded = copy.deepcopy(model).to(torch.bfloat16)
        windows, seqlen = self.arguments.max_windows, self.arguments.ppl_seqlen
        return float(perplexity(rounded, self.held_out, seqlen, max_windows=windows)["ppl"])

    def record(self, model: PreTrainedModel, variant: str, step: int, **more: object) -> None:
        """Quantize a model, measure it before and after, and append the row."""
        arguments = self.arguments
        quantized, _, bits = self.once if model is self.original else self.quantize(model)
        spread = [concentration(model.get_submodule(name).weight) for name in self.targets]
        row = {
            "variant": variant,
            "step": step,
            "perplexity": self.measure(model),
            "quantized_perplexity": self.measure(quantized),
            "bits_per_weight": bits,
            "concentration": sum(spread) / len(spread),
            **more,
        }
        told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row | {"arguments": told}) + "\n")
        print(json.dumps(row), flush=True)


def points_left(arguments: argparse.Namespace, variant: str) -> set[int]:
    """The points that have no row yet."""
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if all(row["arguments"][key] == getattr(arguments, key) for key in ("preset", "seed"))]
    return set(arguments.points) - {row["step"] for row in rows if row["variant"] == variant}


def merged_now(run: Restoration) -> PreTrainedModel:
    """A copy of the model with the adapters of the moment merged; training goes on undisturbed."""
    model = copy.deepcopy(run.plain)
    with torch.no_grad():
        for name, weight in run.weights().items():
            model.get_submodule(name).weight.data = weight
    return model.eval()


def run_variant(bench: Bench, variant: str) -> None:
    """Train one variant, measuring it at every point that has no row yet."""
    arguments = bench.arguments
    names = ("steps", "rank", "alpha", "lr", "batch_size", "seqlen", "seed")
    settings = {name: getattr(arguments, name) for name in names} | VARIANTS[variant]
    config = PreprocessConfig(accumulation=1).replaced(settings)
    left = points_left(arguments, variant) & set(range(1, config.steps + 1))
    if not left:
        return
    once, grids, _ = bench.once
    start = copy.deepcopy(bench.original if config.start == "original" else once)
    run = Restoration(start, bench.targets, config, teacher=bench.original, grids=grids)
    losses: list[float] = []
    began, paused = time.monotonic(), 0.0

    def on_step(step: int, steps: int, loss: float) -> None:
        nonlocal paused
        losses.append(loss)
        recent = sum(losses[-20:]) / len(losses[-20:])
        seconds = time.monotonic() - began - paused
        if step % 10 == 0:
            print(f"{variant}: step {step}/{steps}, loss {recent:.4f}, {seconds:.0f} s of training", flush=True)
        if step in left:
            pause = time.monotonic()
            bench.record(merged_now(run), variant, step, loss=recent, seconds=seconds, settings=asdict(config))
            paused += time.monotonic() - pause

    fitting = len(evaluation_tokens(arguments.text, bench.tokenizer)) // config.seqlen
    samples = bench.windows(min(fitting, config.steps * config.batch_size), config.seqlen)
    run.train(samples, arguments.work / variant, on_step)


def table(path: Path) -> None:
    """Print the rows of a file as Markdown: perplexity, quantized perplexity, concentration; means over seeds."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for row in rows:
        found.setdefault((row["arguments"]["preset"], row["variant"], row["step"]), []).append(row)
    print(
        "| preset | variant | steps | seeds | perplexity | quantized | lowest, highest | in a tenth of the channels |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (preset, variant, step), group in found.items():
        columns = [[row[key] for row in group] for key in ("perplexity", "quantized_perplexity", "concentration")]
        before, after, spread = (sum(column) / len(column) for column in columns)
        span = f"{min(columns[1]):.1f}, {max(columns[1]):.1f}" if len(group) > 1 else "-"
        print(f"| {preset} | {variant} | {step} | {len(group)} | {before:.2f} | {after:.1f} | {span} | {spread:.1%} |")


def main() -> None:
    """Run every variant that has rows missing, or print the table of a file with `--table FILE`."""
    if sys.argv[1:2] == ["--table"]:
        return table(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model")
    add("--text", required=True, help="SOURCE to calibrate with and to learn from")
    add("--ppl", required=True, help="held-out SOURCE")
    add("--out", type=Path, required=True)
    add("--work", type=Path, required=True, help="folder for the adapters")
    add("--preset", default="paper", help="of both quantizations")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--bits", type=float)
    budget.add_argument("--salient-ratio", type=float)
    add("--epochs", type=int, default=1)
    add("--samples", type=int, default=16, help="of calibration")
    add("--calib-seqlen", type=int, default=256)
    add("--max-windows", type=int, default=40)
    add("--ppl-seqlen", type=int, default=512)
    add("--points", type=int, nargs="*", default=[0, 50, 100, 200, 300])
    add("--steps", type=int, default=300, help="of the cosine schedule")
    add("--rank", type=int, default=64)
    add("--alpha", type=int, default=16)
    add("--lr", type=float, default=1e-4)
    add("--batch-size", type=int, default=4)
    add("--seqlen", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    if arguments.salient_ratio is None and arguments.bits is None:
        arguments.bits = 1.61
    bench = Bench(arguments)
    if 0 in points_left(bench.arguments, "original"):
        bench.record(bench.original, "original", 0)
    if 0 in points_left(bench.arguments, "requantized"):  # what the second quantization does without any adapters
        bench.record(bench.once[0], "requantized", 0)
    for variant in bench.arguments.variants:
        run_variant(bench, variant)


if __name__ == "__main__":
    main()
