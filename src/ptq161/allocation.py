"""How many channels of every linear get 1 bit, a ternary digit or 4 bits, under one budget for the whole model.

Linears that see the same input share one split. Every split of every shared input has an exact price in bytes, padding
and vectors included, and an expected harm; of those only the ones on the lower convex hull can be optimal. Starting
from the cheapest split everywhere, the budget goes to the step along a hull that repairs most harm per byte.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ptq161.binarize import FOUR_BIT, ONE_BIT, TERNARY, CodeWidth, salient_count
from ptq161.budget import LinearShape, model_layout, salient_ratio
from ptq161.config import QuantConfig
from ptq161.errors import InputError
from ptq161.layout import ModelLayout, PackedLinearSpec
from ptq161.packing import GroupLayout, LinearLayout, codes_per_byte, packed_length, type_width

MIXED_WIDTHS = (ONE_BIT, TERNARY, FOUR_BIT)  # of the column groups, in this order

# Squared error of rounding a standard normal variable to the best 2, 3 and 16 equally spaced levels (Max, 1960).
NORMAL_ERROR = (0.3634, 0.1902, 0.01154)

# Of the channels that are not at 4 bits when only their ratio is given: about what the budget of 1.61 bits leads to.
TERNARY_SHARE = 2 / 3

# How importance falls off over the channels where nothing was measured: a power below one of exponential quantiles,
# because learning evens out part of what sets channels apart before it.
FALL_OFF = 0.75

MOST_STEPS = 512  # splits that are tried per width: wide linears are searched in coarser steps


@dataclass(frozen=True)
class SharedInput:
    """Linears that see the same input and hence share their column groups; the first stores the column types."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    cols: int


@dataclass(frozen=True)
class Split:
    """Channels at 1 bit, ternary and 4 bits; bytes stored and harm expected for all linears of a shared input."""

    sizes: tuple[int, int, int]
    nbytes: int
    harm: float


Harms = Mapping[str, Float[Tensor, "cols widths"]]  # first linear of a shared input -> harm of its channels


def mixed_layout(rows: int, sizes: Sequence[int]) -> LinearLayout:
    """Column groups of 1-bit, ternary and 4-bit channels with one scale per row each; no empty group."""
    counts = zip(MIXED_WIDTHS, sizes, strict=True)
    groups = [GroupLayout(width.name, count, zero=False, mean=False, col=False) for width, count in counts if count]
    return LinearLayout(rows, tuple(groups))


def allocate(
    shapes: Mapping[str, LinearShape],
    config: QuantConfig,
    harms: Harms | None = None,
) -> ModelLayout:
    """The layout of a whole model within `config.bits`, or with `config.salient_ratio` of the channels at 4 bits.

    harms: first linear of a shared input -> expected harm of each channel at each of MIXED_WIDTHS. Without, every
    shared input counts the same per weight and its channels' importance is taken to fall off by FALL_OFF.

    Raises InputError naming the lowest reachable figure if no split stays within the budget.
    """
    inputs = shared_inputs(shapes)
    if config.salient_ratio is not None:
        splits = [ratio_split(shared.cols, config.salient_ratio) for shared in inputs]
    else:
        assert config.bits is not None
        hulls = [
            _hull(shared, _expected_harm(shared) if harms is None else harms[shared.names[0]]) for shared in inputs
        ]
        weights = sum(shape.rows * shape.cols for shape in shapes.values())
        splits = [split.sizes for split in _spend(hulls, config.bits, weights)]
    linears = {}
    for shared, sizes in zip(inputs, splits, strict=True):
        for name, rows in zip(shared.names, shared.rows, strict=True):
            layout = mixed_layout(rows, sizes)
            owner = shared.names[0] if name != shared.names[0] and len(layout.groups) > 1 else None
            linears[name] = PackedLinearSpec(layout, owner)
    return ModelLayout({name: linears[name] for name in shapes})


def paper_allocation(shapes: Mapping[str, LinearShape], config: QuantConfig, harms: Harms | None) -> ModelLayout:
    """The paper's: one salient ratio for every linear, whatever its harm. Raises InputError (see salient_ratio)."""
    return model_layout(shapes, salient_ratio(shapes, config), config.row_mean)


# Method -> how it divides the channels of every linear under the budget.
LAYOUTS: dict[str, Callable[[Mapping[str, LinearShape], QuantConfig, Harms | None], ModelLayout]] = {
    "ptq161": paper_allocation,
    "mixed": allocate,
}


def shared_inputs(shapes: Mapping[str, LinearShape]) -> list[SharedInput]:
    """The linears by the input that they share, in order."""
    members: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        members.setdefault(shape.columns_from or name, []).append(name)
    return [
        SharedInput(tuple(names), tuple(shapes[name].rows for name in names), shapes[first].cols)
        for first, names in members.items()
    ]


def ratio_split(cols: int, ratio: float) -> tuple[int, int, int]:
    """Sizes with `ratio` of the channels at 4 bits, and of the others two thirds ternary, one third at 1 bit."""
    four_bit = salient_count(ratio, cols)
    ternary = round(TERNARY_SHARE * (cols - four_bit))
    return cols - four_bit - ternary, ternary, four_bit


def _expected_harm(shared: SharedInput) -> Float[Tensor, "cols widths"]:
    """Without any statistics: falling importance times the error of a normal variable."""
    quantiles = -((torch.arange(shared.cols, dtype=torch.float64) + 0.5) / shared.cols).log()
    importance = quantiles**FALL_OFF
    return sum(shared.rows) * importance[:, None] * torch.tensor(NORMAL_ERROR, dtype=torch.float64)


def _hull(shared: SharedInput, harm: Float[Tensor, "cols widths"]) -> list[Split]:
    """The splits on the lower convex hull of (bytes, harm), cheapest first."""
    cols = shared.cols
    # What 1-bit codes harm most gets the wider codes: the importance of a channel is common to all widths.
    ranked = harm[harm[:, 0].argsort(descending=True, stable=True)].double()
    total = torch.nn.functional.pad(ranked.cumsum(0), (0, 0, 1, 0))  # total[n]: of the n most important channels
    four_bit, ternary = _counts(cols, FOUR_BIT), _counts(cols, TERNARY)
    four_bit, ternary = (grid.flatten() for grid in torch.meshgrid(four_bit, ternary, indexing="ij"))
    fits = four_bit + ternary <= cols
    four_bit, ternary = four_bit[fits], ternary[fits]
    wide = four_bit + ternary
    harms = total[four_bit, 2] + total[wide, 1] - total[four_bit, 1] + total[-1, 0] - total[wide, 0]
    sizes = torch.stack([cols - wide, ternary, four_bit], dim=1)
    nbytes = _stored_bytes(shared, sizes)
    order = harms.argsort(stable=True)
    order = order[nbytes[order].argsort(stable=True)]  # by bytes, and by harm among equals
    hull: list[tuple[int, float, int]] = []
    for price, value, index in zip(nbytes[order].tolist(), harms[order].tolist(), order.tolist(), strict=True):
        if hull and (price == hull[-1][0] or value >= hull[-1][1]):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], (price, value)):
            hull.pop()
        hull.append((price, value, index))
    return [Split(tuple(sizes[index].tolist()), price, value) for price, value, index in hull]


def _slope(one: Sequence[float], other: Sequence[float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def _counts(cols: int, width: CodeWidth) -> Tensor:
    """Numbers of channels worth trying at a width: whole bytes, in at most MOST_STEPS steps, and all of them."""
    whole = codes_per_byte(width.count)
    step = whole * -(-cols // (whole * MOST_STEPS))
    return torch.tensor([*range(0, cols, step), cols])


def _stored_bytes(shared: SharedInput, sizes: Tensor) -> Tensor:
    """Bytes of all linears of a shared input for each split (splits, widths): codes, scales, column types."""
    rows = sum(shared.rows)
    per_byte = torch.tensor([codes_per_byte(width.count) for width in MIXED_WIDTHS])
    codes = (-(-sizes // per_byte)).sum(dim=1)
    groups = (sizes > 0).sum(dim=1)
    types = torch.tensor([0, 0, *(packed_length(shared.cols, type_width(n)) for n in (2, 3))])
    return rows * (codes + 2 * groups) + types[groups]


def _spend(hulls: Sequence[Sequence[Split]], bits: float, weights: int) -> list[Split]:
    """One split per hull: repeatedly the step that repairs most harm per byte, as long as the budget lasts.

    A step that no longer fits ends its hull only; cheaper ones elsewhere may still fit. Raises InputError.
    """
    budget = int(bits * weights / 8)
    spent = sum(hull[0].nbytes for hull in hulls)
    if spent > budget:
        raise InputError(
            f"bits={bits} cannot be reached on this model: its row vectors alone bring the lowest figure to "
            f"{8 * spent / weights:.3f} bits per weight; ask for more bits, or give --salient-ratio"
        )
    chosen = [0] * len(hulls)
    steps = [(_gain(hull, 0), index) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, index = heapq.heappop(steps)
        hull, at = hulls[index], chosen[index]
        price = hull[at + 1].nbytes - hull[at].nbytes
        if spent + price > budget:
            continue
        spent += price
        chosen[index] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (_gain(hull, at + 1), index))
    return [hull[at] for hull, at in zip(hulls, chosen, strict=True)]


def _gain(hull: Sequence[Split], at: int) -> float:
    """Change of harm per byte of the next step: the lower, the better."""
    return _slope((hull[at].nbytes, hull[at].harm), (hull[at + 1].nbytes, hull[at + 1].harm))
