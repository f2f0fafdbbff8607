"""The ops behind packed linears. Importing this package defines them.

`ptq161::linear` takes the stored tensors on any device; a module per device may add a faster implementation.
`ptq161::tiled_linear` takes the order that CPU kernels read (tiles.py, cpu.py).
"""

from ptq161.kernels.cpu import ReadyWeight, tiled_linear, tiled_rows
from ptq161.kernels.memory import TileMemory
from ptq161.kernels.native import kernels as cpu_kernels
from ptq161.kernels.native import read_memory, tile, untile
from ptq161.kernels.ops import has_fast_kernel, linear
from ptq161.kernels.tiles import TiledWeight, column_types

__all__ = [
    "ReadyWeight",
    "TileMemory",
    "TiledWeight",
    "column_types",
    "cpu_kernels",
    "has_fast_kernel",
    "linear",
    "read_memory",
    "tile",
    "tiled_linear",
    "tiled_rows",
    "untile",
]
