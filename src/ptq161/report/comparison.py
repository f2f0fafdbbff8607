"""Rows of a comparison as a reader wants them: named, in order, each beside full precision."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptq161.errors import InputError
from ptq161.report.families import Family, family_of


@dataclass(frozen=True)
class Entry:
    """One row of results.jsonl and what it is shown as. number: its place in the tables and figures, from 1."""

    number: int
    row: Mapping[str, Any]
    family: Family

    @property
    def label(self) -> str:
        """The name in tables; a model that was preprocessed before says so."""
        name = str(self.row["method"] or Path(self.row["model"]).name)
        return name if self.row["preprocessing"] is None else f"{name}, preprocessed"

    def ppl(self, text: str) -> float | None:
        """Perplexity on a text; None where it was not measured."""
        entry = (self.row["perplexity"] or {}).get(text)
        return None if entry is None else float(entry["ppl"])


@dataclass(frozen=True)
class Comparison:
    """Everything on the page about a comparison.

    original: the row at full precision. entries: the quantized rows that were measured, best on the first text first.
    left_out: the others. ablations: by file name, rows with `variant`, `bits_per_weight` and `perplexity`.
    channels: magnitudes of input channels, see `magnitudes`. maps: method -> block -> code width of every channel.
    salient: of a preprocessed model, where its salient weights lay before and after, see `maps_figure`.
    memory: model -> format -> bytes.
    """

    original: Mapping[str, Any]
    entries: Sequence[Entry]
    left_out: Sequence[Mapping[str, Any]]
    ablations: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    channels: Sequence[Mapping[str, Any]] = ()
    maps: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    salient: Sequence[Mapping[str, Any]] = ()
    memory: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """The evaluation texts, as typed."""
        return list(self.original["perplexity"])

    @property
    def name(self) -> str:
        """The model's name, as far as its path tells."""
        path = Path(self.original["model"])
        return path.stem if path.suffix == ".gguf" else path.name

    def original_ppl(self, text: str) -> float:
        """Perplexity of the original."""
        return float(self.original["perplexity"][text]["ppl"])


def arranged(rows: Sequence[Mapping[str, Any]], source: Path, **more: Any) -> Comparison:
    """Put the rows of results.jsonl in order. Raises InputError, naming the file, if none is at full precision."""
    measured = [row for row in rows if row["status"] == "ok" and row["perplexity"]]
    plain = [row for row in measured if row["bits_per_weight"] is None and row["preprocessing"] is None]
    if not plain:
        raise InputError(
            f"{source} has no row at full precision to compare with: `ptq161 compare` writes one, or `ptq161 eval "
            f"MODEL --ppl TEXT --out {source}`"
        )
    text = next(iter(plain[0]["perplexity"]))
    quantized = [row for row in measured if row is not plain[0]]
    quantized.sort(key=lambda row: row["perplexity"].get(text, {}).get("ppl", float("inf")))
    entries = [Entry(number, row, family_of(row)) for number, row in enumerate(quantized, start=1)]
    return Comparison(plain[0], entries, [row for row in rows if row not in measured], **more)


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a .jsonl file, each with these columns. Raises InputError naming file, line and what is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read rows from {path}: {error}; expected a .jsonl file of results") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} line {number} is not JSON: {error}; expected one row a line") from error
        missing = [column for column in columns if not isinstance(row, dict) or column not in row]
        if missing:
            raise InputError(f"{path} line {number} has no {missing[0]!r}: expected rows with {', '.join(columns)}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} is empty: expected a row a line")
    return rows


RESULT_COLUMNS = ("model", "method", "preprocessing", "bits_per_weight", "claimed_bits", "perplexity", "status")
ABLATION_COLUMNS = ("variant", "perplexity")
