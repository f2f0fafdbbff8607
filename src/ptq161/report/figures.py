"""One function per figure: JSON values in, a matplotlib Figure out. No global state (no pyplot), no file is touched.

Every function takes the figure's width in inches, so that a page can hold a wide and a narrow drawing of the same
data. The colours are those of the palette, so that a page can swap them for a dark theme.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'figures need {error.name}: pip install "ptq161[report]"', name=error.name) from error

from ptq161.report.palette import MINUS, STYLE, WHOLE, WIDTHS, colour, part
from ptq161.report.results import Channels, Corner

CELL_INCHES = 0.235  # a weight of the corner


def storage_figure(files: Mapping[str, Mapping[str, int]], width: float) -> Figure:
    """Horizontal stacked bars: file -> part -> bytes. Zero parts are left out; the total stands behind each bar."""
    with drawing(width, 0.9 + 0.42 * len(files) + _legend_height(files.values(), width)) as (figure, axes):
        longest = max(sum(parts.values()) for parts in files.values())
        for row, parts in enumerate(files.values()):
            left = 0.0
            for name, size in parts.items():
                if name == WHOLE:
                    axes.barh(row, size / 1e6, height=0.6, facecolor="none", edgecolor=colour("other"))
                else:
                    axes.barh(row, size / 1e6, left=left, height=0.62, color=colour(part(name)[1]))
                left += size / 1e6
            axes.text(left + longest / 1e6 * 0.015, row, f"{left:.1f} MB", va="center")
        axes.set_yticks(range(len(files)), list(files))
        axes.set_xlim(0, longest / 1e6 * (1.17 if width > 5 else 1.33))
        axes.set_xlabel("file size, MB (millions of bytes)")
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False, bottom=False)
        _parts_legend(figure, files.values(), width)
    return figure


def bits_figure(parts: Mapping[str, int], weights: int, width: float) -> Figure:
    """One stacked bar of bits per weight: 8 * bytes of each part over the quantized weights."""
    with drawing(width, 0.95 + _legend_height([parts], width)) as (figure, axes):
        left = 0.0
        for name, size in parts.items():
            bits = 8 * size / weights
            axes.barh(0, bits, left=left, height=0.62, color=colour(part(name)[1]))
            if bits > 0.12:
                axes.text(left + bits / 2, 0, f"{bits:.2f}", ha="center", va="center", color=colour("on_colour"))
            left += bits
        axes.text(left * 1.01, 0, f"{left:.3f}", va="center", fontweight="bold")
        axes.set_yticks([])
        axes.set_xlim(0, left * (1.1 if width > 5 else 1.18))
        axes.set_xlabel("bits per weight of the linear layers")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(bottom=False)
        _parts_legend(figure, [parts], width)
    return figure


def loss_figure(blocks: Sequence[Mapping[str, Any]], width: float) -> Figure:
    """Objective of every block at its start and as it is stored, on a logarithmic axis."""
    with drawing(width, 2.9) as (figure, axes):
        index = [block["index"] for block in blocks]
        first = [block["loss_first"] for block in blocks]
        last = [block["loss_last"] for block in blocks]
        axes.vlines(index, last, first, color=colour("grid"), linewidth=2.5)
        axes.plot(index, first, "o", color=colour("other"), markersize=4.5, label="at the start")
        axes.plot(index, last, "o", color=colour("sign"), markersize=4.5, label="as stored")
        logarithmic(axes)
        axes.set_xlabel("decoder block")
        axes.set_ylabel("difference from the original block")
        axes.grid(axis="y", which="major")
        axes.tick_params(which="both", bottom=False, left=False, labelleft=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def learning_figure(record: Mapping[str, Any], width: float) -> Figure:
    """Divergence from the original against tokens read, beside that on held-out samples before and after.

    record: `distillation` of the JSON of `ptq161 quantize`.
    """
    with drawing(width, 2.9) as (figure, axes):
        tokens = [point["tokens"] / 1e3 for point in record["curve"]]
        axes.plot(tokens, [point["divergence"] for point in record["curve"]], color=colour("other"), label="as read")
        held_out = [record["held_out_first"], record["held_out_last"]]
        axes.plot([0, tokens[-1]], held_out, "o", color=colour("sign"), markersize=5, label="on held-out text")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("thousand tokens learned from")
        axes.set_ylabel("divergence, nats per token")
        axes.grid(axis="y")
        axes.tick_params(bottom=False, left=False)
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def channels_figure(channels: Sequence[Channels], width: float) -> Figure:
    """Importance of every input channel, one panel per linear, coloured by code width (after Fig. 3a of the paper)."""
    height = 0.5 + (1.45 if width > 5 else 1.6) * len(channels)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(len(channels), squeeze=False)[:, 0]
        for axes, shown in zip(panels, channels, strict=True):
            _dots(axes, shown, width)
            counts = ", ".join(f"{shown.widths.count(name)} × {WIDTHS[name][0]}" for name in _widths([shown.widths]))
            axes.set_title(f"block {shown.block}, {shown.linear}:{' ' if width > 5 else chr(10)}{counts}")
        panels[-1].set_xlabel("input channel")
        figure.supylabel(channels[0].measure, fontsize=9, color=colour("muted"))
        drawn = _widths(shown.widths for shown in channels)
        legend(figure, [WIDTHS[name][:2] for name in drawn], len(drawn))
    return figure


def _dots(axes: Axes, shown: Channels, width: float) -> None:
    """One dot per channel of a linear, on a logarithmic axis."""
    highest = max(shown.importance) or 1.0
    # A channel that is next to dead must not take the axis from the others.
    lowest = max(min((value for value in shown.importance if value > 0), default=highest), highest / 1e9)
    # Thousands of dots in a few hundred points must not hide each other.
    diameter = min(4.0, max(2.0, 2 * (width - 0.8) * 72 / len(shown.importance)))
    for name in _widths([shown.widths]):
        chosen = [index for index, of_channel in enumerate(shown.widths) if of_channel == name]
        # One path of very short lines with round ends: markers would write an element for every channel.
        x = [value for i in chosen for value in (i, i + 0.01, float("nan"))]
        y = [value for i in chosen for value in (*[max(shown.importance[i], lowest)] * 2, float("nan"))]
        axes.plot(x, y, color=colour(WIDTHS[name][1]), linewidth=diameter, solid_capstyle="round")
    axes.set_xlim(-1, len(shown.importance))
    axes.set_ylim(lowest * 0.7, highest * 1.4)
    logarithmic(axes)
    axes.grid(axis="y")
    axes.tick_params(which="both", bottom=False, left=False)


def corner_figure(corner: Corner, width: float) -> Figure:
    """Some weights of a linear as they are stored: a sign, a ternary digit or an odd level of -15 to 15 each.

    Positive levels have strong colours, negative ones faint ones, zeros none. A narrow figure shows fewer channels.
    """
    shown = min(len(corner.widths), int(width / CELL_INCHES))
    drawn = _widths([corner.widths[:shown]])
    with drawing(width, len(corner.codes) * width / shown + 0.25) as (figure, axes):
        for row, levels in enumerate(corner.codes):
            for column, (level, name) in enumerate(zip(levels[:shown], corner.widths, strict=False)):
                _weight(axes, column, row, level, name)
        axes.set_xlim(0, shown)
        axes.set_ylim(len(corner.codes), 0)
        axes.set_aspect("equal")
        axes.axis("off")
        legend(figure, [WIDTHS[name][:2] for name in drawn], len(drawn))
    return figure


def _weight(axes: Axes, column: int, row: int, level: int, width: str) -> None:
    """One cell of the corner."""
    purpose = WIDTHS[width][1]
    face = colour(purpose) if level > 0 else colour(f"{purpose}_minus") if level < 0 else "none"
    edge = "none" if level else colour(f"{purpose}_minus")
    axes.add_patch(Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, facecolor=face, edgecolor=edge, linewidth=0.8))
    ink = colour("on_colour") if level > 0 else colour(purpose)
    text, size = (str(level).replace("-", MINUS), 6.5) if width == "4bit" else ({1: "+", 0: "0", -1: MINUS}[level], 8)
    axes.text(column + 0.5, row + 0.54, text, ha="center", va="center", fontsize=size, color=ink)


def _widths(channels: Iterable[Sequence[str]]) -> list[str]:
    """The code widths that occur among channels, narrowest first."""
    occurring = {name for widths in channels for name in widths}
    return [name for name in WIDTHS if name in occurring]


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one panel, in the page's style while it is drawn."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def logarithmic(axes: Axes) -> None:
    """Make the y axis of a finished plot logarithmic: plain numbers, more of them where it spans little."""
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if highest > 30 * lowest else (1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _shown_parts(files: Iterable[Mapping[str, int]]) -> list[str]:
    return list(dict.fromkeys(name for parts in files for name, size in parts.items() if size and name != WHOLE))


def _legend_columns(width: float) -> int:
    return 3 if width > 5 else 2


def _legend_height(files: Iterable[Mapping[str, int]], width: float) -> float:
    return 0.21 * -(-len(_shown_parts(files)) // _legend_columns(width))


def _parts_legend(figure: Figure, files: Iterable[Mapping[str, int]], width: float) -> None:
    names, columns = _shown_parts(files), _legend_columns(width)
    by_column = [name for column in range(columns) for name in names[column::columns]]
    legend(figure, [part(name) for name in by_column], columns)


def legend(figure: Figure, entries: Sequence[tuple[str, str]], columns: int) -> None:
    """Names beside patches of their colours, above the panels. entries: (label, colour purpose)."""
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour(purpose), label=label) for label, purpose in entries]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handleheight=0.8)
