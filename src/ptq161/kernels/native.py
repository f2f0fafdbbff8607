"""The native extension `_native` (csrc), where it is built: which kernels run here, layouts, codes into tiles and back.

Only this module and cpu.py call the extension, with addresses and sizes, which C++ checks once more.
"""

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ptq161.binarize import CODE_WIDTHS
from ptq161.errors import InputError
from ptq161.kernels import tiles
from ptq161.kernels.memory import TileMemory
from ptq161.kernels.tiles import TiledWeight, code_bits, tile_bytes, tile_count
from ptq161.packing import LinearLayout, PackedWeight, codes_name

native: ModuleType | None
try:
    from ptq161.kernels import _native as native  # type: ignore[attr-defined,no-redef,unused-ignore]
except ImportError as error:
    if error.name is not None and error.name != "ptq161.kernels":
        raise  # it is there and broken
    native = None


def kernels() -> tuple[str, ...]:
    """The native kernels that run here, fastest first; empty if the extension is not built."""
    return () if native is None else tuple(native.kernels())


def tile(packed: PackedWeight, memory: TileMemory | None = None) -> TiledWeight:
    """Bring a stored weight into tiles, in `memory` if it is given; the arrangement is that of `tiles.tile`."""
    if native is None or packed.tensors["weight"].device.type != "cpu":
        return tiles.tile(packed)
    target = None if memory is None else memory.take(tile_count(packed.layout), tile_bytes(packed.layout))
    return tiles.tile(packed, _write_codes, target)


def untile(tiled: TiledWeight) -> PackedWeight:
    """Inverse of `tile`: exactly the stored tensors."""
    return tiles.untile(tiled, tiles.read_codes if native is None or tiled.tiles.device.type != "cpu" else _read_codes)


def read_memory(words: Tensor, threads: int) -> int:
    """Sum of int64 words modulo 2**64, read once by `threads` threads: what a product without arithmetic would cost."""
    assert native is not None and words.dtype == torch.int64 and words.is_contiguous()
    total: int = native.read_memory(array(words), threads)
    return total


def array(tensor: Tensor | None) -> tuple[int, int]:
    """A tensor as the extension takes it: address and number of elements; zeros for none."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel())


@lru_cache(maxsize=4096)
def native_layout(layout: LinearLayout) -> Any:
    """The extension's form of a layout. Raises InputError for sizes out of range."""
    assert native is not None
    groups = []
    for group in layout.groups:
        width = CODE_WIDTHS[group.width]
        groups.append((code_bits(width), group.cols, width.lowest, width.step, group.zero, group.mean))
    try:
        made = native.Layout(layout.rows, groups)
    except ValueError as error:
        raise InputError(f"a linear of {layout.rows} x {layout.cols} is too large: {error}") from error
    assert (made.tiles, made.tile_bytes) == (tile_count(layout), tile_bytes(layout))
    return made


def _write_codes(layout: LinearLayout, index: int, codes: Tensor, target: Tensor) -> None:
    assert native is not None
    count = CODE_WIDTHS[layout.groups[index].width].count
    codes = codes.contiguous()
    native.codes_to_tiles(native_layout(layout), index, count, array(codes), array(target), torch.get_num_threads())


def _read_codes(layout: LinearLayout, index: int, source: Tensor) -> Tensor:
    assert native is not None
    count, shape = CODE_WIDTHS[layout.groups[index].width].count, layout.specs()[codes_name(index)].shape
    codes, source = source.new_empty(shape), source.contiguous()
    native.codes_from_tiles(native_layout(layout), index, count, array(codes), array(source), torch.get_num_threads())
    return codes
