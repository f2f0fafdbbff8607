"""Pieces of a self-contained HTML page: no script, no font, no link to anything outside the file.

Figures are inline SVG, each drawn twice (wide and narrow; CSS shows one), with colours that follow the reader's light
or dark theme. Text goes through `escape` unless it is markup made here.
"""

import io
import re
from collections.abc import Callable, Sequence
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

from ptq161.report.palette import COLOURS, STYLE

WIDE_INCHES, NARROW_INCHES = 7.6, 4.0

_VARIABLES = "".join(f"--{purpose}: {light};" for purpose, (light, _) in COLOURS.items())
_DARK_VARIABLES = "".join(f"--{purpose}: {dark};" for purpose, (_, dark) in COLOURS.items())
_CSS = f"""
:root {{ color-scheme: light dark; --paper: #ffffff; --panel: #f5f7f9; {_VARIABLES} }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #14181e; --panel: #1c222a; {_DARK_VARIABLES} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 800px; padding: 28px 20px 64px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 1.75em; line-height: 1.2; margin: 0 0 0.5em; }}
h2 {{ font-size: 1.2em; margin: 2.4em 0 0.4em; }}
p {{ margin: 0.6em 0; }}
figure {{ margin: 1.2em 0; }}
figcaption, .note {{ color: var(--muted); font-size: 0.875em; line-height: 1.45; }}
figure svg {{ display: block; width: 100%; height: auto; }}
.narrow {{ display: none; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 10px; margin: 1.4em 0; }}
.tile {{ background: var(--panel); border-radius: 8px; padding: 12px 14px; }}
.tile b {{ display: block; font-size: 1.3em; line-height: 1.3; white-space: nowrap; }}
.tile span {{ color: var(--muted); font-size: 0.875em; line-height: 1.35; display: block; }}
.warning {{ border-left: 4px solid var(--salient); background: var(--panel); padding: 10px 14px; margin: 1.4em 0;
  border-radius: 0 8px 8px 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.94em; }}
th, td {{ text-align: left; padding: 6px 16px 6px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }}
th {{ color: var(--muted); font-weight: 600; font-size: 0.9em; vertical-align: bottom; }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th.number {{ white-space: normal; }}
tr > :last-child {{ padding-right: 0; }}
tr.total td {{ font-weight: 600; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin: 0.4em 0 1.8em; }}
.pair div {{ background: var(--panel); border-radius: 8px; padding: 10px 14px; min-width: 0; }}
.pair h3 {{ font-size: 0.82em; color: var(--muted); margin: 0 0 4px; }}
.sample {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: 0.94em; }}
.sample b {{ font-weight: 600; }}
pre {{ background: var(--panel); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font-size: 0.8em; }}
code {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
@media (max-width: 620px) {{
  body {{ padding: 18px 14px 48px; }}
  h1 {{ font-size: 1.45em; }}
  .tiles {{ grid-template-columns: 1fr 1fr; }}
  .wide {{ display: none; }} .narrow {{ display: block; }}
  .pair {{ grid-template-columns: 1fr; }}
  table {{ font-size: 0.86em; }} th, td {{ padding-right: 8px; }}
  .tile {{ padding: 10px 12px; }} .tile b {{ font-size: 1.15em; }}
}}
"""


def document(title: str, body: Sequence[str]) -> str:
    """The whole page. `body` is markup."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def figure(name: str, draw: Callable[[float], Figure], alternative: str, caption: str) -> str:
    """A figure in both widths. `draw` takes inches; `alternative` is read out in place of the picture."""
    drawings = (
        f'<div class="{kind}">{svg(draw(inches), f"{name}-{kind}")}</div>'
        for kind, inches in (("wide", WIDE_INCHES), ("narrow", NARROW_INCHES))
    )
    return (
        f'<figure><div role="img" aria-label="{escape(alternative)}">{"".join(drawings)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def svg(drawn: Figure, name: str) -> str:
    """A figure as inline SVG: ids made unique by `name`, the palette's colours as CSS variables."""
    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", text)
    # Paths to a hundredth of a point: a third of the page's size, and nothing to be seen.
    text = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    for purpose, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{purpose})")
    return text


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), totals: Sequence[int] = ()
) -> str:
    """A table of plain text; the columns listed in `numbers` are set flush right, the rows in `totals` bold."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        classes = [' class="number"' if index in numbers else "" for index in range(len(header))]
        return "".join(f"<{tag}{c}>{escape(text)}</{tag}>" for c, text in zip(classes, texts, strict=True))

    body = "".join(
        f"<tr{' class=total' if index in totals else ''}>{cells('td', row)}</tr>" for index, row in enumerate(rows)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """A row of headline figures: (figure, what it is)."""
    cells = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in values)
    return f'<div class="tiles">{"".join(cells)}</div>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text, optionally of a class such as `note` or `warning`."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"
