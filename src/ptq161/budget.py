"""The bit budget: the largest salient ratio whose packed bytes stay within a number of bits per weight."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ptq161.binarize import salient_count
from ptq161.config import QuantConfig
from ptq161.errors import InputError
from ptq161.layout import ModelLayout, PackedLinearSpec
from ptq161.packing import COLUMN_TYPES, GroupLayout, LinearLayout


@dataclass(frozen=True)
class LinearShape:
    """A linear to be quantized. `columns_from`: the earlier linear that sees the same input, if there is one."""

    rows: int
    cols: int
    columns_from: str | None = None


def paper_layout(rows: int, cols: int, salient: int, row_mean: bool) -> LinearLayout:
    """The paper's two column groups: `cols - salient` binarized channels, `salient` at 4 bits; no empty group."""
    groups = []
    if salient < cols:
        groups.append(GroupLayout("1bit", cols - salient, zero=False, mean=row_mean, col=True))
    if salient:
        groups.append(GroupLayout("4bit", salient, zero=True, mean=False, col=False))
    return LinearLayout(rows, tuple(groups))


def model_layout(shapes: Mapping[str, LinearShape], ratio: float, row_mean: bool) -> ModelLayout:
    """The packed layout of a whole model at one salient ratio. A linear of a single group has no types to share."""
    linears = {}
    for name, shape in shapes.items():
        layout = paper_layout(shape.rows, shape.cols, salient_count(ratio, shape.cols), row_mean)
        linears[name] = PackedLinearSpec(layout, shape.columns_from if len(layout.groups) > 1 else None)
    return ModelLayout(linears)


def salient_ratio(shapes: Mapping[str, LinearShape], config: QuantConfig) -> float:
    """The salient ratio that `config` asks for on this model: as given, or the largest within `config.bits`.

    One ratio serves every linear. Because rows are rounded up to whole bytes the bits are not quite monotonic in the
    ratio, so every ratio at which some linear gains a column is a candidate, tried from the top.

    Raises InputError naming the lowest reachable figure if no ratio stays within the budget.
    """
    if config.salient_ratio is not None:
        return config.salient_ratio
    assert config.bits is not None
    kinds = Counter((shape.rows, shape.cols, shape.columns_from is None) for shape in shapes.values())
    weights = sum(rows * cols * number for (rows, cols, _), number in kinds.items())

    def bits_at(ratio: float) -> float:
        stored = sum(
            _stored_bytes(rows, cols, owner, salient_count(ratio, cols), config.row_mean) * number
            for (rows, cols, owner), number in kinds.items()
        )
        return 8 * stored / weights

    ratios = sorted({count / cols for _, cols, _ in kinds for count in range(cols + 1)}, reverse=True)
    # Codes alone take 1 + 3 * (count / cols) bits: beyond this ratio none can do, and skipping them saves seconds.
    highest = (config.bits - 1) / 3 + max(1 / cols for _, cols, _ in kinds)
    for ratio in ratios:
        if ratio <= highest and bits_at(ratio) <= config.bits:
            return ratio
    lowest = min(bits_at(ratio) for ratio in ratios)
    raise InputError(
        f"bits={config.bits} cannot be reached on this model: its row vectors alone bring the lowest figure to "
        f"{lowest:.3f} bits per weight; ask for more bits, or give --salient-ratio"
    )


@lru_cache(maxsize=1 << 16)
def _stored_bytes(rows: int, cols: int, owner: bool, salient: int, row_mean: bool) -> int:
    specs = paper_layout(rows, cols, salient, row_mean).specs()
    return sum(spec.nbytes for name, spec in specs.items() if owner or name != COLUMN_TYPES)
