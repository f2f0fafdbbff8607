"""Perplexity of `best` over tokens and minutes of distillation, and its trend, from rows of benchmarks/results.

    .venv/bin/python benchmarks/trend.py benchmarks/results/presets-smollm2-135m.jsonl docs/trend.svg \
        --text wikitext2_test.raw --full-precision 29.98

Runs of seed 0 on one calibration; the one without distillation is where they start. The trend is a power law of
ln(perplexity / full precision) in tokens, by least squares over the distilled runs. What it takes by that to reach
`--aim` times full precision is printed.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy


class Run(NamedTuple):
    """One point: tokens of distillation, minutes of the whole run, perplexity."""

    tokens: int
    minutes: float
    perplexity: float


def main() -> None:
    """Draw the figure, print the trend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("figure", type=Path)
    parser.add_argument("--text", required=True, help="whose perplexity")
    parser.add_argument("--full-precision", type=float, required=True, help="perplexity of the original there")
    parser.add_argument("--aim", type=float, default=1.5, help="times full precision")
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    runs = sorted(run(row, args.text) for row in rows if row["recipe"] in ("fast", "best") and row["seed"] == 0)
    factor, power = trend(runs, args.full_precision)
    needed = (math.log(args.aim) / factor) ** (1 / power)
    for tokens, minutes, perplexity in runs:
        print(f"{tokens:>9,} tokens, {minutes:5.1f} min: {perplexity:.2f} = {perplexity / args.full_precision:.2f} x")
    print(f"ln(perplexity / full precision) = {factor:.3g} * tokens ** {power:.3f}")
    print(f"{args.aim} x full precision after {needed / 1e6:.1f} million tokens, if that went on")
    draw(runs, args.full_precision, args.aim, needed, (factor, power), args.figure)


def run(row: dict[str, Any], text: str) -> Run:
    """What is drawn of a row."""
    tokens = (row["distillation"] or {"tokens": 0})["tokens"]
    return Run(tokens, row["seconds"] / 60, row["perplexity"][text]["ppl"])


def trend(runs: list[Run], full_precision: float) -> tuple[float, float]:
    """Factor and power by which the excess follows the tokens."""
    distilled = [run for run in runs if run.tokens]
    excess = [math.log(run.perplexity / full_precision) for run in distilled]
    power, level = numpy.polyfit(numpy.log([run.tokens for run in distilled]), numpy.log(excess), 1)
    return math.exp(level), float(power)


def draw(
    runs: list[Run], full_precision: float, aim: float, needed: float, law: tuple[float, float], path: Path
) -> None:
    """Perplexity over tokens with the trend as far as the aim, and over minutes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from ptq161.report.palette import STYLE, colour

    perplexities = [run.perplexity for run in runs]
    with rc_context({**STYLE, "svg.hashsalt": "trend"}):  # the same file from the same rows
        figure = Figure(figsize=(7.6, 3.2), layout="constrained")
        by_tokens, by_minutes = figure.subplots(1, 2, sharey=True)
        by_tokens.plot([run.tokens / 1e6 for run in runs], perplexities, "o", color=colour("sign"), label="measured")
        further = numpy.linspace(min(run.tokens for run in runs if run.tokens), needed)
        expected = full_precision * numpy.exp(law[0] * further ** law[1])
        by_tokens.plot(further / 1e6, expected, "--", color=colour("other"), label="trend")
        by_minutes.plot([run.minutes for run in runs], perplexities, "o", color=colour("sign"))
        by_tokens.set(xlabel="million tokens of distillation", ylabel="perplexity", ylim=(0, 1.1 * max(perplexities)))
        by_minutes.set(xlabel="minutes of the whole run", xlim=(0, None))
        for axes in (by_tokens, by_minutes):
            axes.axhline(full_precision, color=colour("other"), linewidth=0.8)
            axes.axhline(aim * full_precision, color=colour("other"), linewidth=0.8, linestyle=":")
            axes.grid(axis="y")
        by_minutes.annotate("full precision", (0, full_precision), (4, -11), textcoords="offset points", fontsize=8)
        by_minutes.annotate(f"{aim:g} ×", (0, aim * full_precision), (4, 4), textcoords="offset points", fontsize=8)
        by_tokens.legend()
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
