"""Figures of a comparison: one function each, rows in, a matplotlib Figure out, drawn as those of `figures`."""

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ptq161.report.comparison import Comparison, Entry
from ptq161.report.families import bits_by_label
from ptq161.report.figures import drawing, legend, logarithmic
from ptq161.report.palette import STYLE, WIDTHS, colour

ROW_INCHES = 0.27  # of a horizontal bar chart


def purpose_of(entry: Entry) -> str:
    """Colour purpose of a row: ours stand out."""
    return "sign" if entry.family.ours else "muted"


def bits_figure(comparison: Comparison, text: str, width: float) -> Figure:
    """Bits per weight against perplexity over that of full precision (after Fig. 1 of the paper).

    A filled dot stands at the bits that storing the model takes, a hollow one at those its authors claim.
    """
    with drawing(width, 4.2 if width > 5 else 3.6) as (figure, axes):
        shown = [entry for entry in comparison.entries if entry.ppl(text) and entry.row["bits_per_weight"]]
        original = comparison.original_ppl(text)
        points = [(entry.row["bits_per_weight"], (entry.ppl(text) or 0.0) / original) for entry in shown]
        for entry, (bits, ratio) in zip(shown, points, strict=True):
            shade, claimed = colour(purpose_of(entry)), entry.row["claimed_bits"]
            if claimed is not None:
                axes.plot([claimed, bits], [ratio, ratio], "-", color=shade, linewidth=0.8, zorder=1)
                axes.plot([claimed], [ratio], "o", color=shade, markersize=5, markerfacecolor="none", zorder=2)
            axes.plot([bits], [ratio], "o", color=shade, markersize=6, zorder=3)
        axes.axhline(1.0, color=colour("grid"), linewidth=1.2)
        axes.set_yscale("log")
        axes.set_ylim(0.7, max([2.0, *(ratio for _, ratio in points)]) * 2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}×")
        furthest = max([2.0, *(bits for bits, _ in points)])
        axes.set_xlim(0.8, furthest * (1.12 if width > 5 else 1.2))
        span = log10(axes.get_ylim()[1] / axes.get_ylim()[0])
        for entry, (bits, ratio) in zip(shown, points, strict=True):
            # To the right of its dot, unless another dot is there.
            hidden = any(0 < other - bits < 0.12 * furthest and _near(ratio, r, span) for other, r in points)
            place, side = (-0.02, "right") if hidden else (0.02, "left")
            shade = colour(purpose_of(entry))
            axes.text(bits + place * furthest, ratio, str(entry.number), va="center", ha=side, fontsize=8, color=shade)
        axes.set_xlabel("bits per weight of the linear layers")
        axes.set_ylabel("perplexity, times that of full precision")
        axes.grid(axis="both")
        axes.tick_params(which="both", bottom=False, left=False)
        keys = [
            Line2D([], [], marker="o", linestyle="", color=colour("ink"), label="what storing it takes"),
            Line2D([], [], marker="o", linestyle="", color=colour("ink"), markerfacecolor="none", label="claimed"),
            Line2D([], [], marker="o", linestyle="", color=colour("sign"), label="this package"),
        ]
        figure.legend(handles=keys, loc="outside upper left", ncols=3 if width > 5 else 2)
    return figure


def _near(one: float, other: float, span: float) -> bool:
    """Whether two heights on a logarithmic axis of so many decades would be drawn over each other."""
    return abs(log10(one / other)) < 0.04 * span


def parts_figure(entries: Sequence[Entry], width: float) -> Figure:
    """What a weight's bits are spent on, one stacked bar per row."""
    parts = [bits_by_label(entry.row) for entry in entries]
    used = {label: purpose for shares in parts for label, (purpose, _) in shares.items()}
    height = 0.85 + ROW_INCHES * len(entries) + 0.21 * len(used)
    with drawing(width, height) as (figure, axes):
        for place, shares in enumerate(parts):
            left = 0.0
            for purpose, bits in shares.values():
                axes.barh(place, bits, left=left, height=0.66, color=colour(purpose))
                left += bits
            axes.text(left + 0.04, place, f"{left:.2f}", va="center", fontsize=8)
        _names(axes, entries)
        axes.set_xlim(0, max(sum(bits for _, bits in shares.values()) for shares in parts) * 1.1)
        axes.set_xlabel("bits per weight")
        legend(figure, list(used.items()), 1 if width < 5 else 2)
    return figure


def blocks_figure(entries: Sequence[Entry], named: int, width: float) -> Figure:
    """Error of the hidden states after every decoder block; ours and the `named` best others have a colour."""
    with drawing(width, 3.3 if width > 5 else 3.6) as (figure, axes):
        shown = [entry for entry in entries if entry.row.get("block_errors")]
        ours = [entry for entry in shown if entry.family.ours]
        others = [entry for entry in shown if not entry.family.ours]
        shades = dict(zip((entry.number for entry in ours + others[:named]), LINES, strict=False))
        for entry in sorted(shown, key=lambda entry: entry.number in shades):
            errors = [float("nan") if error is None else error for error in entry.row["block_errors"]]
            shade = shades.get(entry.number)
            label = None if shade is None else f"{entry.number} {entry.label}"
            axes.plot(errors, color=colour(shade or "dense"), linewidth=1.6 if shade else 0.9, label=label)
        logarithmic(axes)
        axes.set_xlabel("decoder block")
        axes.set_ylabel("error over size of the states")
        axes.grid(axis="y")
        axes.tick_params(which="both", bottom=False, left=False)
        figure.legend(loc="outside upper left", ncols=2 if width > 5 else 1)
    return figure


LINES = ("sign", "columns", "salient", "scales", "third")


def effort_figure(entries: Sequence[Entry], width: float) -> Figure:
    """Minutes that quantizing took, one bar per row, with the memory at its highest."""
    timed = [entry for entry in entries if entry.row["seconds"]]
    with drawing(width, 0.7 + ROW_INCHES * len(timed)) as (figure, axes):
        for place, entry in enumerate(timed):
            minutes, peak = entry.row["seconds"] / 60, entry.row["peak_rss_bytes"]
            axes.barh(place, minutes, height=0.66, color=colour(purpose_of(entry)))
            memory = "" if peak is None else f", {peak / 1e9:.1f} GB"
            axes.text(minutes, place, f" {minutes:.1f} min{memory}", va="center", fontsize=8)
        _names(axes, timed)
        axes.set_xlim(0, max(entry.row["seconds"] for entry in timed) / 60 * (1.3 if width > 5 else 1.8))
        axes.set_xlabel("minutes")
    return figure


def tasks_figure(scores: Mapping[str, Sequence[tuple[str, float, float]]], width: float) -> Figure:
    """Task by task the score of every row, with one standard error to each side. scores: (row, score, error)."""
    with rc_context(STYLE):
        rows = max(len(of_task) for of_task in scores.values())
        figure = Figure(figsize=(width, (0.55 + 0.2 * rows) * len(scores) + 0.2), layout="constrained")
        for axes, (task, of_task) in zip(
            figure.subplots(len(scores), squeeze=False)[:, 0], scores.items(), strict=True
        ):
            for place, (_, score, error) in enumerate(of_task):
                shade = colour("ink" if place == 0 else "sign")
                axes.errorbar([score], [place], xerr=[error], fmt="o", color=shade, markersize=4, linewidth=1.2)
            axes.set_title(task)
            axes.set_yticks(range(len(of_task)), [name for name, _, _ in of_task])
            axes.invert_yaxis()
            axes.grid(axis="x")
            axes.tick_params(bottom=False, left=False)
    return figure


def magnitudes_figure(channels: Sequence[Mapping[str, Any]], width: float) -> Figure:
    """Mean magnitude of the inputs and of the weights of every channel, one panel per linear (after Fig. 3a)."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 0.5 + 1.55 * len(channels)), layout="constrained")
        panels = figure.subplots(len(channels), squeeze=False)[:, 0]
        for axes, shown in zip(panels, channels, strict=True):
            for key, shade in (("inputs", "salient"), ("weights", "sign")):
                axes.plot(shown[key], color=colour(shade), linewidth=0.8)
            logarithmic(axes)
            axes.set_xlim(0, len(shown["inputs"]) - 1)
            axes.set_title(f"block {shown['block']}, {shown['linear']}")
            axes.grid(axis="y")
            axes.tick_params(which="both", bottom=False, left=False)
        panels[-1].set_xlabel("input channel")
        legend(figure, [("mean |input|", "salient"), ("mean |weight|", "sign")], 2)
    return figure


def map_figure(widths: Sequence[Sequence[str]], width: float) -> Figure:
    """Code width of every input channel of one linear of each block: a row of the picture per block."""
    drawn = [name for name in WIDTHS if any(name in of_block for of_block in widths)]
    points = max(0.7, 0.8 * (width - 0.8) * 72 / len(widths[0]))
    with drawing(width, 1.2 + 0.075 * len(widths)) as (figure, axes):
        for name in drawn:
            if name == drawn[0] and len(drawn) > 1:
                continue  # the most common is the ground
            for block, of_block in enumerate(widths):
                chosen = [channel for channel, of_channel in enumerate(of_block) if of_channel == name]
                axes.vlines(chosen, block - 0.5, block + 0.5, color=colour(WIDTHS[name][1]), linewidth=points)
        axes.axhspan(-0.5, len(widths) - 0.5, color=colour(f"{WIDTHS[drawn[0]][1]}_minus"), zorder=0)
        axes.set_xlim(-0.5, len(widths[0]) - 0.5)
        axes.set_ylim(len(widths) - 0.5, -0.5)
        axes.set_xlabel("input channel")
        axes.set_ylabel("decoder block")
        axes.tick_params(bottom=False, left=False)
        grounds = [(WIDTHS[drawn[0]][0], f"{WIDTHS[drawn[0]][1]}_minus"), *(WIDTHS[name][:2] for name in drawn[1:])]
        legend(figure, grounds, len(grounds))
    return figure


def _names(axes: Axes, entries: Sequence[Entry]) -> None:
    """Rows of a bar chart by number and name, the first on top."""
    axes.set_yticks(range(len(entries)), [f"{entry.number} {entry.label}" for entry in entries], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False, bottom=False)
