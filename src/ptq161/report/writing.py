"""The report as files: one page, and every figure of it as a PNG."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context

from ptq161.errors import InputError
from ptq161.report.comparison import Comparison
from ptq161.report.comparison_page import comparison_page
from ptq161.report.drawings import drawings
from ptq161.report.page import WIDE_INCHES
from ptq161.report.palette import STYLE

PAGE, FIGURES, DPI = "report.html", "figures", 160


def write_report(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Write report.html and figures/*.png into a folder, over older ones. Returns their paths.

    Raises InputError if the folder cannot be written to.
    """
    text = comparison_page(comparison)
    pictures = {}
    try:
        (folder / FIGURES).mkdir(exist_ok=True)
        for name, draw in drawings(comparison).items():
            pictures[name] = str(folder / FIGURES / f"{name.replace(':', ',')}.png")
            with rc_context(STYLE):
                draw(WIDE_INCHES).savefig(pictures[name], dpi=DPI, facecolor="white", metadata={"Software": None})
        (folder / PAGE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write the report to {folder}: {error.strerror}; expected a folder that can be"
        ) from error
    return {"page": str(folder / PAGE), "figures": pictures}
