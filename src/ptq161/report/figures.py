"""One function per figure: JSON values in, a matplotlib Figure out. No global state (no pyplot), no file is touched.

Every function takes the figure's width in inches, so that a page can hold a wide and a narrow drawing of the same
data. The colours are those of COLOURS, each used for one purpose, so that a page can swap them for a dark theme.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'figures need {error.name}: pip install "ptq161[report]"', name=error.name) from error

# Purpose -> (light, dark). The light value is what is drawn.
COLOURS: dict[str, tuple[str, str]] = {
    "ink": ("#1e2329", "#e6e9ee"),
    "muted": ("#5d6672", "#9aa4b2"),
    "grid": ("#dfe3e8", "#333b46"),
    "sign": ("#3d6fd1", "#6f9bf0"),
    "minus": ("#dbe5f8", "#243450"),
    "salient": ("#d9730d", "#f0964a"),
    "third": ("#8a4fc4", "#b58be6"),
    "scales": ("#1f9180", "#4cc2ae"),
    "columns": ("#c03b76", "#ea7fae"),
    "other": ("#9aa2ad", "#6a7482"),
    "dense": ("#c9ced6", "#434c59"),
    "on_colour": ("#ffffff", "#10141a"),
}
PARTS = {
    "codes_1bit": ("signs, 1 bit each", "sign"),
    "codes_ternary": ("ternary codes, 1.6 bits each", "third"),
    "codes_4bit": ("4-bit codes", "salient"),
    "scales": ("row and column factors", "scales"),
    "columns": ("mask of salient channels", "columns"),
    "other": ("not quantized", "other"),
    "dense": ("linear layers at 16 bits", "dense"),
}
WHOLE = "file"  # a file whose parts are not known: drawn hollow
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "text.color": COLOURS["ink"][0],
    "axes.labelcolor": COLOURS["muted"][0],
    "axes.edgecolor": COLOURS["grid"][0],
    "axes.titlecolor": COLOURS["ink"][0],
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"][0],
    "xtick.color": COLOURS["muted"][0],
    "ytick.color": COLOURS["muted"][0],
    "xtick.labelcolor": COLOURS["muted"][0],
    "ytick.labelcolor": COLOURS["ink"][0],
    "legend.frameon": False,
    "legend.handlelength": 1.0,
    "legend.columnspacing": 1.2,
}


@dataclass(frozen=True)
class Channels:
    """Input channels of one linear: the magnitude of each on the calibration text, and which are salient."""

    block: int
    linear: str
    measure: str  # such as "mean |x|"
    magnitude: Sequence[float]
    salient: Sequence[bool]


def colour(purpose: str) -> str:
    """The colour drawn for a purpose."""
    return COLOURS[purpose][0]


def part(name: str) -> tuple[str, str]:
    """Label and colour purpose of a part of the file; a code width without an entry here gets its own name."""
    if name in PARTS:
        return PARTS[name]
    return f"{name.removeprefix('codes_')} codes" if name.startswith("codes_") else name, "third"


def storage_figure(files: Mapping[str, Mapping[str, int]], width: float) -> Figure:
    """Horizontal stacked bars: file -> part -> bytes. Zero parts are left out; the total stands behind each bar."""
    with _figure(width, 0.9 + 0.42 * len(files) + _legend_height(files.values(), width)) as (figure, axes):
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
    with _figure(width, 0.95 + _legend_height([parts], width)) as (figure, axes):
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
    """Objective of every block with its first and with its stored factors, on a logarithmic axis."""
    with _figure(width, 2.9) as (figure, axes):
        index = [block["index"] for block in blocks]
        first = [block["loss_first"] for block in blocks]
        last = [block["loss_last"] for block in blocks]
        axes.vlines(index, last, first, color=colour("grid"), linewidth=2.5)
        axes.plot(index, first, "o", color=colour("other"), markersize=4.5, label="before learning")
        axes.plot(index, last, "o", color=colour("sign"), markersize=4.5, label="as stored")
        _logarithmic(axes)
        axes.set_xlabel("decoder block")
        axes.set_ylabel("difference from the original block")
        axes.grid(axis="y", which="major")
        axes.tick_params(which="both", bottom=False, left=False, labelleft=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def channels_figure(channels: Sequence[Channels], width: float) -> Figure:
    """Magnitude of every input channel, one panel per linear, salient channels coloured (Fig. 3a of the paper)."""
    height = 0.5 + 1.45 * len(channels)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(len(channels), squeeze=False)[:, 0]
        for axes, shown in zip(panels, channels, strict=True):
            highest = max(shown.magnitude) or 1.0
            # A channel that is next to dead must not take the axis from the others.
            lowest = max(min((value for value in shown.magnitude if value > 0), default=highest), highest / 1e5)
            for wanted, purpose in ((False, "other"), (True, "salient")):
                sticks = [i for i, salient in enumerate(shown.salient) if salient == wanted]
                # One path of disconnected sticks: a collection would write an element for every channel.
                x = [value for i in sticks for value in (i, i, float("nan"))]
                y = [value for i in sticks for value in (lowest * 0.8, max(shown.magnitude[i], lowest), float("nan"))]
                # Thousands of sticks in a few hundred points: as wide as one channel's place, but visible.
                stroke = max(0.35, 0.6 * (width - 0.8) * 72 / len(shown.magnitude))
                axes.plot(x, y, color=colour(purpose), linewidth=stroke, solid_capstyle="butt")
            axes.set_xlim(-1, len(shown.magnitude))
            axes.set_ylim(lowest * 0.8, highest * 1.25)
            _logarithmic(axes)
            axes.set_title(
                f"block {shown.block}, {shown.linear}: {sum(shown.salient)} of {len(shown.salient)} channels"
            )
            axes.grid(axis="y")
            axes.tick_params(which="both", bottom=False, left=False)
        panels[-1].set_xlabel("input channel")
        figure.supylabel(f"{channels[0].measure} on the calibration text", fontsize=9, color=colour("muted"))
        _legend(figure, [("binarized channels", "other"), ("salient channels, 4 bits", "salient")], 2)
    return figure


def corner_figure(codes: Sequence[Sequence[int]], salient: Sequence[bool], width: float) -> Figure:
    """A corner of a packed weight as it is stored: + and - for binarized channels, 0 to 15 for salient ones.

    codes: rows of levels, one per channel of `salient`. A narrow figure shows fewer channels.
    """
    shown = min(len(salient), int(width / 0.235))
    with _figure(width, len(codes) * width / shown) as (figure, axes):
        for row, levels in enumerate(codes):
            for column in range(shown):
                if salient[column]:
                    text, face, ink = str(levels[column]), "salient", "on_colour"
                elif levels[column] > 0:
                    text, face, ink = "+", "sign", "on_colour"
                else:
                    text, face, ink = "\N{MINUS SIGN}", "minus", "sign"
                axes.add_patch(Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, facecolor=colour(face)))
                axes.text(column + 0.5, row + 0.54, text, ha="center", va="center", fontsize=8, color=colour(ink))
        axes.set_xlim(0, shown)
        axes.set_ylim(len(codes), 0)
        axes.set_aspect("equal")
        axes.axis("off")
    return figure


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def _logarithmic(axes: Axes) -> None:
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
    _legend(figure, [part(name) for name in by_column], columns)


def _legend(figure: Figure, entries: Sequence[tuple[str, str]], columns: int) -> None:
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour(purpose), label=label) for label, purpose in entries]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handleheight=0.8)
