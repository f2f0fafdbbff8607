"""Where the salient weights of a linear lie, before and after preprocessing (after Fig. 4 and 10 of the paper)."""

from collections.abc import Mapping, Sequence
from typing import Any

try:
    from matplotlib import rc_context
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'figures need {error.name}: pip install "ptq161[report]"', name=error.name) from error

from ptq161.report.palette import STYLE, colour


def maps_figure(maps: Sequence[Mapping[str, Any]], width: float) -> Figure:
    """One row of panels per linear, one column per stage; the darker a cell, the more salient weights are in it.

    maps: `{linear, stage, shape, counts}` each, the counts of cells with input channels downwards. The panels of a
    linear share their scale. width: of the figure, in inches.
    """
    linears = list(dict.fromkeys(shown["linear"] for shown in maps))
    stages = list(dict.fromkeys(shown["stage"] for shown in maps))
    shades = LinearSegmentedColormap.from_list("salient", [colour("on_colour"), colour("salient"), colour("ink")])
    with rc_context(STYLE):
        figure = Figure(figsize=(width, width / len(stages) * len(linears) + 0.3), layout="constrained")
        panels = figure.subplots(len(linears), len(stages), squeeze=False)
        for shown in maps:
            row, column = linears.index(shown["linear"]), stages.index(shown["stage"])
            axes = panels[row, column]
            highest = max(max(map(max, other["counts"])) for other in maps if other["linear"] == shown["linear"])
            axes.imshow(shown["counts"], cmap=shades, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            rows, cols = shown["shape"]
            axes.set_xlabel(f"{rows} outputs")
            axes.set_title(shown["stage"])
            if column == 0:
                axes.set_ylabel(f"{shown['linear']}\n{cols} input channels")
    return figure
