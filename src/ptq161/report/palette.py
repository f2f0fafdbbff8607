"""Colours and names of what is drawn, each colour for one purpose, so that a page can swap them for a dark theme."""

from typing import Any

# Purpose -> (light, dark). The light value is what is drawn.
COLOURS: dict[str, tuple[str, str]] = {
    "ink": ("#1e2329", "#e6e9ee"),
    "muted": ("#5d6672", "#9aa4b2"),
    "grid": ("#dfe3e8", "#333b46"),
    "sign": ("#3d6fd1", "#6f9bf0"),
    "sign_minus": ("#dbe5f8", "#243450"),
    "salient": ("#d9730d", "#f0964a"),
    "salient_minus": ("#fae3ce", "#4d3014"),
    "third": ("#8a4fc4", "#b58be6"),
    "third_minus": ("#e9def6", "#3a2750"),
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
    "scales": ("scale factors", "scales"),
    "columns": ("widths of the channels", "columns"),
    "other": ("not quantized", "other"),
    "dense": ("linear layers at 16 bits", "dense"),
}
MINUS = "\N{MINUS SIGN}"
# Code width -> (name, colour purpose, its levels in words), narrowest first. A purpose has a faint twin, `.._minus`.
WIDTHS = {
    "1bit": ("1 bit", "sign", f"+ or {MINUS}"),
    "ternary": ("ternary", "third", f"+, 0 or {MINUS}"),
    "4bit": ("4 bits", "salient", f"an odd number from {MINUS}15 to 15"),
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


def colour(purpose: str) -> str:
    """The colour drawn for a purpose."""
    return COLOURS[purpose][0]


def part(name: str) -> tuple[str, str]:
    """Label and colour purpose of a part of the file; a code width without an entry here gets its own name."""
    if name in PARTS:
        return PARTS[name]
    return f"{name.removeprefix('codes_')} codes" if name.startswith("codes_") else name, "third"
