"""The order of a packed weight in memory that CPU kernels read, made from the stored tensors and back without loss.

A tile is 32 rows: the codes of each group, then each group's row vectors. A unit of codes is 32 bits of every row of
the tile, [row][4 bytes]; column 4 * k + j of a unit is in byte j at bit bits * k. Ternary codes take 2 bits there. Why
this order: csrc/kernels.h. What a tile has beyond the rows and columns of the weight is zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float, Int32, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from ptq161.binarize import CODE_WIDTHS, CodeWidth, ColumnGroup, group_values
from ptq161.packing import (
    COLUMN_TYPES,
    GroupLayout,
    LinearLayout,
    PackedWeight,
    codes_name,
    pack_codes,
    type_width,
    unpack_codes,
)

TILE_ROWS = 32
_QUAD = 4  # columns that lie side by side, one to a byte
_CHUNK = 1 << 24  # weights that are unpacked to a byte each at once

WriteCodes = Callable[[LinearLayout, int, Tensor, Tensor], None]
ReadCodes = Callable[[LinearLayout, int, Tensor], Tensor]


@dataclass(frozen=True)
class TiledWeight:
    """One linear for CPU kernels. Types are plain: the op makes one of whatever it was given before it checks that.

    tiles: uint8 (tiles, bytes). order: int32 (cols,), the input channel of each column in the order of the groups;
    None for a single group. col: float16 (cols,), their column scales, ones for groups without; None if none has any.
    """

    layout: LinearLayout
    tiles: Tensor
    order: Tensor | None
    col: Tensor | None


@dataclass(frozen=True)
class _Place:
    """Where a group's parts lie in a tile: byte offsets, and the number of units."""

    group: GroupLayout
    bits: int
    codes: int
    units: int
    scale: int
    mean: int
    zero: int
    end: int


def code_bits(width: CodeWidth) -> int:
    """Bits of a code in memory: 1, 2, 4 or 8."""
    return next(bits for bits in (1, 2, 4, 8) if 2**bits >= width.count)


def tile_count(layout: LinearLayout) -> int:
    """Tiles of a linear; the last may have fewer than 32 rows."""
    return -(-layout.rows // TILE_ROWS)


def tile_bytes(layout: LinearLayout) -> int:
    """Bytes of one tile, a multiple of 64."""
    return -(-_places(layout)[-1].end // 64) * 64


@lru_cache(maxsize=4096)
def group_offsets(layout: LinearLayout) -> tuple[tuple[int, int], ...]:
    """Byte offsets of each group's codes and of its row vectors in a tile."""
    return tuple((place.codes, place.scale) for place in _places(layout))


def write_codes(layout: LinearLayout, index: int, codes: UInt8[Tensor, "rows bytes"], tiles: Tensor) -> None:
    """Write the stored codes of group `index` into the tiles. The definition of what csrc/tiles.cpp does."""
    place = _places(layout)[index]
    width = _digits(CODE_WIDTHS[place.group.width])
    for first, last in _chunks(layout):
        digits = unpack_codes(codes[first * TILE_ROWS : last * TILE_ROWS], place.group.cols, width).to(torch.uint8)
        tiles[first:last, place.codes : place.codes + place.units * TILE_ROWS * _QUAD] = _to_units(digits, place)


def read_codes(layout: LinearLayout, index: int, tiles: Tensor) -> UInt8[Tensor, "rows bytes"]:
    """Inverse of `write_codes`."""
    place = _places(layout)[index]
    parts = []
    for first, last in _chunks(layout):
        digits = _from_units(tiles[first:last], place)[: layout.rows - first * TILE_ROWS]
        parts.append(pack_codes(digits, _digits(CODE_WIDTHS[place.group.width])))
    return torch.cat(parts)


def tile(packed: PackedWeight, write_codes: WriteCodes = write_codes, tiles: Tensor | None = None) -> TiledWeight:
    """Bring a stored weight into tiles. A single group needs no order: its columns are in natural order.

    tiles: zeros to be written, of the shape that `tile_count` and `tile_bytes` say; made if there are none.
    """
    layout, tensors = packed.layout, packed.tensors
    if tiles is None:
        tiles = tensors["weight"].new_zeros((tile_count(layout), tile_bytes(layout)))
    cols = []
    for index, place in enumerate(_places(layout)):
        group, width = place.group, CODE_WIDTHS[place.group.width]
        write_codes(layout, index, tensors[codes_name(index)], tiles)
        _put(tiles, place.scale, tensors[f"scale_{index}"])
        if group.mean:
            _put(tiles, place.mean, tensors[f"mean_{index}"])
        if group.zero:
            _put(tiles, place.zero, unpack_codes(tensors[f"zero_{index}"], layout.rows, width))
        ones = tiles.new_ones(group.cols, dtype=torch.float16)
        cols.append(tensors[f"col_{index}"] if group.col else ones)
    order = None
    if COLUMN_TYPES in tensors:
        types = unpack_codes(tensors[COLUMN_TYPES], layout.cols, type_width(len(layout.groups)))
        order = types.argsort(stable=True).to(torch.int32)
    return TiledWeight(layout, tiles, order, torch.cat(cols) if any(group.col for group in layout.groups) else None)


def untile(tiled: TiledWeight, read_codes: ReadCodes = read_codes) -> PackedWeight:
    """Inverse of `tile`: exactly the stored tensors."""
    layout, tiles = tiled.layout, tiled.tiles
    tensors, start = {}, 0
    for index, place in enumerate(_places(layout)):
        group, width = place.group, CODE_WIDTHS[place.group.width]
        tensors[codes_name(index)] = read_codes(layout, index, tiles)
        tensors[f"scale_{index}"] = _get(tiles, place.scale, torch.float16, layout.rows)
        if group.mean:
            tensors[f"mean_{index}"] = _get(tiles, place.mean, torch.float16, layout.rows)
        if group.zero:
            tensors[f"zero_{index}"] = pack_codes(_get(tiles, place.zero, torch.int8, layout.rows), width)
        if group.col:
            assert tiled.col is not None
            tensors[f"col_{index}"] = tiled.col[start : start + group.cols].clone()
        start += group.cols
    if tiled.order is not None:
        tensors[COLUMN_TYPES] = column_types(layout, tiled.order)
    return PackedWeight(layout, {name: tensors[name] for name in layout.specs()})


def chosen_rows(tiled: TiledWeight, rows: Int64[Tensor, " chosen"]) -> Float[Tensor, "chosen cols"]:
    """These rows, float32, of a weight whose single group has no vector but its scale: what an embedding looks up."""
    (place,) = _places(tiled.layout)
    group, width = place.group, CODE_WIDTHS[place.group.width]
    tile, row = rows // TILE_ROWS, rows % TILE_ROWS
    codes = tiled.tiles[:, place.codes : place.codes + place.units * TILE_ROWS * _QUAD]
    units = codes.unflatten(1, (place.units, TILE_ROWS, _QUAD))[tile, :, row]
    levels = _unit_digits(units, place).float() * width.step + width.lowest
    scales = tiled.tiles[:, place.scale : place.scale + 2 * TILE_ROWS].view(torch.float16)
    columns = torch.arange(group.cols, device=rows.device)
    return group_values(ColumnGroup(columns, width, levels, scales[tile, row, None].float()))


def column_types(layout: LinearLayout, order: Int32[Tensor, " cols"]) -> UInt8[Tensor, " bytes"]:
    """The stored column types that this order was made from."""
    sizes = torch.tensor([group.cols for group in layout.groups], device=order.device)
    types = torch.empty(layout.cols, dtype=torch.int32, device=order.device)
    types[order.long()] = torch.arange(len(sizes), dtype=torch.int32, device=order.device).repeat_interleave(sizes)
    return pack_codes(types, type_width(len(layout.groups)))


def _places(layout: LinearLayout) -> list[_Place]:
    codes, units = [], []
    offset = 0
    for group in layout.groups:
        per_unit = 32 // code_bits(CODE_WIDTHS[group.width])
        codes.append(offset)
        units.append(-(-group.cols // per_unit))
        offset += units[-1] * TILE_ROWS * _QUAD
    places = []
    for group, start, count in zip(layout.groups, codes, units, strict=True):
        mean = offset + 2 * TILE_ROWS
        zero = mean + 2 * TILE_ROWS * group.mean
        end = zero + TILE_ROWS * group.zero
        bits = code_bits(CODE_WIDTHS[group.width])
        places.append(_Place(group, bits, start, count, scale=offset, mean=mean, zero=zero, end=end))
        offset = end
    return places


def _chunks(layout: LinearLayout) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // (TILE_ROWS * layout.cols))
    for first in range(0, tile_count(layout), step):
        yield first, min(first + step, tile_count(layout))


def _digits(width: CodeWidth) -> CodeWidth:
    """The same codes read as 0, 1, 2, ..."""
    return replace(width, lowest=0, step=1)


def _to_units(digits: UInt8[Tensor, "rows gcols"], place: _Place) -> UInt8[Tensor, "tiles bytes"]:
    rows, cols = digits.shape
    per_unit = 32 // place.bits
    digits = functional.pad(digits, (0, place.units * per_unit - cols, 0, -rows % TILE_ROWS))
    digits = digits.reshape(-1, TILE_ROWS, place.units, 8 // place.bits, _QUAD)
    units = digits[:, :, :, 0].clone()
    for k in range(1, 8 // place.bits):
        units |= digits[:, :, :, k] << place.bits * k
    return units.transpose(1, 2).reshape(units.shape[0], -1)


def _from_units(tiles: UInt8[Tensor, "tiles bytes"], place: _Place) -> UInt8[Tensor, "rows gcols"]:
    size = place.units * TILE_ROWS * _QUAD
    units = tiles[:, place.codes : place.codes + size].reshape(-1, place.units, TILE_ROWS, _QUAD).transpose(1, 2)
    return _unit_digits(units, place).flatten(0, 1)


def _unit_digits(units: UInt8[Tensor, "*batch units 4"], place: _Place) -> UInt8[Tensor, "*batch gcols"]:
    mask = 2**place.bits - 1
    digits = torch.stack([units >> place.bits * k & mask for k in range(8 // place.bits)], dim=-2)
    return digits.flatten(-3)[..., : place.group.cols]


def _put(tiles: Tensor, offset: int, vector: Tensor) -> None:
    size = TILE_ROWS * vector.element_size()
    padded = functional.pad(vector, (0, -len(vector) % TILE_ROWS))
    tiles[:, offset : offset + size] = padded.view(torch.uint8).reshape(-1, size)


def _get(tiles: Tensor, offset: int, dtype: torch.dtype, rows: int) -> Tensor:
    return tiles[:, offset : offset + TILE_ROWS * dtype.itemsize].contiguous().view(dtype).flatten()[:rows].clone()
