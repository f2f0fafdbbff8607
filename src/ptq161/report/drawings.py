"""Which figures there are numbers for in a comparison, and the numbers of those about tasks."""

from collections.abc import Callable

from matplotlib.figure import Figure

from ptq161.report import comparison_figures as figures
from ptq161.report.comparison import Comparison
from ptq161.report.maps import maps_figure

NAMED_OTHERS = 2  # lines of other methods that have a colour and a name in the figure of blocks


def drawings(comparison: Comparison) -> dict[str, Callable[[float], Figure]]:
    """Every figure that there are numbers for, by name, as a function of its width in inches."""
    entries = list(comparison.entries)
    counted = [entry for entry in entries if entry.row.get("bits_by_part")]
    found: dict[str, Callable[[float], Figure]] = {}
    for index, text in enumerate(comparison.texts, start=1):
        found[f"bits-{index}"] = lambda width, text=text: figures.bits_figure(comparison, text, width)  # type: ignore[misc]
    if counted:
        found["parts"] = lambda width: figures.parts_figure(counted, width)
    if any(entry.row.get("block_errors") for entry in entries):
        found["blocks"] = lambda width: figures.blocks_figure(entries, NAMED_OTHERS, width)
    if any(entry.row["seconds"] for entry in entries):
        found["effort"] = lambda width: figures.effort_figure(entries, width)
    if scores := task_scores(comparison):
        found["tasks"] = lambda width: figures.tasks_figure(scores, width)
    if comparison.channels:
        found["channels"] = lambda width: figures.magnitudes_figure(comparison.channels, width)
    if comparison.salient:
        found["salient"] = lambda width: maps_figure(comparison.salient, width)
    for name, widths in comparison.maps.items():
        found[f"map-{name}"] = lambda width, widths=widths: figures.map_figure(widths, width)  # type: ignore[misc]
    return found


def task_scores(comparison: Comparison) -> dict[str, list[tuple[str, float, float]]]:
    """Task -> (row, score, standard error), the original first; of each task the first share that has an error."""
    scores: dict[str, list[tuple[str, float, float]]] = {}
    named = [("full precision", comparison.original), *((entry.label, entry.row) for entry in comparison.entries)]
    for name, row in named:
        for task, measured in (row.get("tasks") or {}).items():
            for metric, value in measured.items():
                head, comma, rest = metric.partition(",")
                error = measured.get(f"{head}_stderr{comma}{rest}")
                if error is not None and head != "perplexity":  # LAMBADA's: no share, and beyond all bounds here
                    scores.setdefault(f"{task}: {metric}", []).append((name, value, error))
                    break
    return scores
