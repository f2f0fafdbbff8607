"""Quantized weight <-> packed bytes. The one place that knows bit order, tensor names and stored sizes.

Layout of one linear in the checkpoint (docs/format.md has a worked example):

    weight, weight_1, ...   uint8 (rows, row_bytes)  codes of group 0, 1, ...; a row is rounded up to whole bytes
    scale_0, scale_1, ...   float16 (rows,)          row scale of the group
    mean_0, ...             float16 (rows,)          row centre, where the group has one
    zero_1, ...             uint8                    zero levels, packed like codes along the rows
    col_0, ...              float16 (gcols,)         column scale, where the group has one
    column_types            uint8                    group number of every input channel, in natural order

Bytes are filled in base `count` of the code width, least significant digit first: 8 signs, 2 nibbles (or 5 ternary
digits) a byte. Group 0's codes are called `weight` so that a loader that does not know the format stops at a size
mismatch instead of running a model with random weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil, log2, prod

import torch
from jaxtyping import UInt8
from torch import Tensor

from ptq161.binarize import CODE_WIDTHS, CodeWidth, ColumnGroup, QuantizedWeight, as_stored
from ptq161.errors import CheckpointError

FORMAT_VERSION = 2


@dataclass(frozen=True)
class GroupLayout:
    """Sizes of one column group: `cols` input channels at `width` (a key of CODE_WIDTHS), and its optional vectors."""

    width: str
    cols: int
    zero: bool
    mean: bool
    col: bool


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor, and the part of the size report it counts towards."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    part: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LinearLayout:
    """Everything about a packed linear that is known without its weights; decides names, shapes and bytes."""

    rows: int
    groups: tuple[GroupLayout, ...]

    @property
    def cols(self) -> int:
        return sum(group.cols for group in self.groups)

    def specs(self) -> dict[str, TensorSpec]:
        """Name -> shape, dtype and part of every tensor stored for this linear, in a fixed order."""
        specs = {}
        for index, group in enumerate(self.groups):
            width = CODE_WIDTHS[group.width]
            row_bytes = packed_length(group.cols, width)
            specs[codes_name(index)] = TensorSpec((self.rows, row_bytes), torch.uint8, f"codes_{group.width}")
            specs[f"scale_{index}"] = TensorSpec((self.rows,), torch.float16, "scales")
            if group.zero:
                specs[f"zero_{index}"] = TensorSpec((packed_length(self.rows, width),), torch.uint8, "scales")
            if group.mean:
                specs[f"mean_{index}"] = TensorSpec((self.rows,), torch.float16, "scales")
            if group.col:
                specs[f"col_{index}"] = TensorSpec((group.cols,), torch.float16, "scales")
        if len(self.groups) > 1:
            types = packed_length(self.cols, type_width(len(self.groups)))
            specs[COLUMN_TYPES] = TensorSpec((types,), torch.uint8, "columns")
        return specs


@dataclass(frozen=True)
class PackedWeight:
    """One linear as stored: its layout and one tensor per name in `layout.specs()`."""

    layout: LinearLayout
    tensors: dict[str, Tensor]


COLUMN_TYPES = "column_types"


def codes_name(index: int) -> str:
    """Name of group `index`'s code tensor."""
    return "weight" if index == 0 else f"weight_{index}"


def type_width(groups: int) -> CodeWidth:
    """Code width of the column types: ceil(log2 groups) bits a channel."""
    return CodeWidth("types", count=2 ** ceil(log2(groups)), lowest=0, step=1)


@cache
def codes_per_byte(count: int) -> int:
    """How many base-`count` digits fit into one byte: 8, 5, 4, 2 for 2, 3, 4, 16."""
    return max(n for n in range(1, 9) if count**n <= 256)


def packed_length(codes: int, width: CodeWidth) -> int:
    """Bytes that hold `codes` codes."""
    return -(-codes // codes_per_byte(width.count))


def pack_codes(levels: Tensor, width: CodeWidth) -> UInt8[Tensor, "*batch bytes"]:
    """Pack integer levels along the last axis; unused digits of the last byte are zero."""
    digits = (levels.to(torch.int32) - width.lowest) // width.step
    per_byte = codes_per_byte(width.count)
    digits = torch.nn.functional.pad(digits, (0, -digits.shape[-1] % per_byte))
    powers = width.count ** torch.arange(per_byte, dtype=torch.int32, device=levels.device)
    digits = digits.reshape(*digits.shape[:-1], digits.shape[-1] // per_byte, per_byte)
    return (digits * powers).sum(-1).to(torch.uint8)


def unpack_codes(packed: UInt8[Tensor, "*batch bytes"], length: int, width: CodeWidth) -> Tensor:
    """Inverse of `pack_codes`: the first `length` levels along the last axis, int8."""
    per_byte = codes_per_byte(width.count)
    powers = width.count ** torch.arange(per_byte, dtype=torch.int32, device=packed.device)
    every_byte = torch.arange(256, dtype=torch.int32, device=packed.device)
    table = (every_byte[:, None] // powers % width.count * width.step + width.lowest).to(torch.int8)
    return table[packed.int()].flatten(-2)[..., :length]


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Pack one linear. Folds scale * row and rounds factors to float16, so pack(unpack(p)) == p exactly."""
    weight = as_stored(weight)
    layout = layout_of(weight)
    tensors = {}
    for index, group in enumerate(weight.groups):
        tensors[codes_name(index)] = pack_codes(group.codes, group.width)
        tensors[f"scale_{index}"] = group.scale.squeeze(1).to(torch.float16)
        if group.zero is not None:
            tensors[f"zero_{index}"] = pack_codes(group.zero.squeeze(1), group.width)
        if group.mean is not None:
            tensors[f"mean_{index}"] = group.mean.squeeze(1).to(torch.float16)
        if group.col is not None:
            tensors[f"col_{index}"] = group.col.squeeze(0).to(torch.float16)
    if len(weight.groups) > 1:
        types = torch.zeros(weight.cols, dtype=torch.int32, device=weight.groups[0].codes.device)
        for index, group in enumerate(weight.groups):
            types[group.columns] = index
        tensors[COLUMN_TYPES] = pack_codes(types, type_width(len(weight.groups)))
    return PackedWeight(layout, {name: tensors[name] for name in layout.specs()})


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """Read one linear back, factors as float32."""
    layout, tensors = packed.layout, packed.tensors
    device = tensors["weight"].device
    if len(layout.groups) > 1:
        types = unpack_codes(tensors[COLUMN_TYPES], layout.cols, type_width(len(layout.groups)))
    else:
        types = torch.zeros(layout.cols, dtype=torch.int8, device=device)
    groups = []
    for index, group in enumerate(layout.groups):
        width = CODE_WIDTHS[group.width]
        zero = unpack_codes(tensors[f"zero_{index}"], layout.rows, width) if group.zero else None
        groups.append(
            ColumnGroup(
                columns=(types == index).nonzero().squeeze(1),
                width=width,
                codes=unpack_codes(tensors[codes_name(index)], group.cols, width),
                scale=tensors[f"scale_{index}"].float()[:, None],
                zero=None if zero is None else zero.float()[:, None],
                mean=tensors[f"mean_{index}"].float()[:, None] if group.mean else None,
                col=tensors[f"col_{index}"].float()[None, :] if group.col else None,
            )
        )
    return QuantizedWeight(tuple(groups))


def layout_of(weight: QuantizedWeight) -> LinearLayout:
    """The stored layout of a quantized weight."""
    return LinearLayout(
        weight.rows,
        tuple(
            GroupLayout(
                group.width.name,
                len(group.columns),
                zero=group.zero is not None,
                mean=group.mean is not None,
                col=group.col is not None,
            )
            for group in weight.groups
        ),
    )


def problems(layout: LinearLayout, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield (tensor name, what is wrong) for tensors that do not form a valid packed linear of this layout.

    Checks names, shapes, dtypes, that every vector is finite, that column types agree with the group sizes, that no
    byte of codes is impossible, and that their padding is zero. Values that are possible but changed are what checksums
    are for.
    """
    specs = layout.specs()
    for name in sorted(set(specs) ^ set(tensors)):
        yield name, "is missing" if name in specs else "does not belong to this linear"
    for name in specs.keys() & tensors.keys():
        spec, tensor = specs[name], tensors[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            found, expected = (f"{dtype}{list(shape)}" for dtype, shape in _shapes(tensor, spec))
            yield name, f"is {found}, expected {expected}"
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            yield name, "has NaN or infinite values"
        elif name == COLUMN_TYPES:
            types = unpack_codes(tensor, layout.cols, type_width(len(layout.groups)))
            found_counts = torch.bincount(types.long(), minlength=len(layout.groups)).tolist()
            expected_counts = [group.cols for group in layout.groups]
            if found_counts != expected_counts:
                yield name, f"assigns {found_counts} channels to the groups, expected {expected_counts}"
            elif _has_padding(tensor, layout.cols, type_width(len(layout.groups)).count):
                yield name, "has padding that is not zero"
        elif tensor.dtype == torch.uint8 and tensor.numel():
            group = layout.groups[int(name.rpartition("_")[2]) if "_" in name else 0]
            count = CODE_WIDTHS[group.width].count
            if int(tensor.max()) >= count ** codes_per_byte(count):
                yield name, f"has a byte that is no {group.width} code"
            elif _has_padding(tensor, layout.rows if name.startswith("zero_") else group.cols, count):
                yield name, "has padding that is not zero"


def _has_padding(packed: Tensor, codes: int, count: int) -> bool:
    """Whether the last byte of any row has other digits than zero after its last code."""
    last = codes - (packed.shape[-1] - 1) * codes_per_byte(count)
    highest: int = count**last - 1  # an int: as a uint8, 256 would be 0
    return int(packed[..., -1].max()) > highest


def checked(layout: LinearLayout, tensors: Mapping[str, Tensor], where: str) -> PackedWeight:
    """A PackedWeight of these tensors. Raises CheckpointError naming the first bad tensor as `where.tensor`."""
    for name, what in problems(layout, tensors):
        raise CheckpointError(f"tensor {where}.{name} {what}; the packed checkpoint is damaged, run `ptq161 verify`")
    return PackedWeight(layout, dict(tensors))


def _shapes(tensor: Tensor, spec: TensorSpec) -> Iterator[tuple[torch.dtype, tuple[int, ...]]]:
    yield tensor.dtype, tuple(tensor.shape)
    yield spec.dtype, spec.shape
