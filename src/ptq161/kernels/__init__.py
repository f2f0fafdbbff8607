"""The ops behind packed linears. Importing this package defines them.

`ptq161::linear` takes the stored tensors on any device; a module per device may add a faster implementation.
`ptq161::tiled_linear` takes the order that kernels read (tiles.py): native ones on a CPU (cpu.py), Triton's on a GPU
(gpu.py, triton.py), which are there where torch has CUDA and Triton is installed.
"""

from importlib.util import find_spec

import torch

from ptq161.kernels.cpu import ReadyWeight
from ptq161.kernels.dense import dense_linear, has_dense_kernel
from ptq161.kernels.memory import TileMemory
from ptq161.kernels.native import kernels as cpu_kernels
from ptq161.kernels.native import read_memory, tile, untile
from ptq161.kernels.ops import has_fast_kernel, has_tiled_kernel, linear
from ptq161.kernels.shared import SharedProduct, joined_layout, joined_tiles
from ptq161.kernels.tiled import tiled_linear, tiled_rows
from ptq161.kernels.tiles import TiledWeight, column_types

if torch.version.cuda is not None and find_spec("triton") is not None:
    from ptq161.kernels import gpu

    gpu.register()

__all__ = [
    "ReadyWeight",
    "SharedProduct",
    "TileMemory",
    "TiledWeight",
    "column_types",
    "cpu_kernels",
    "dense_linear",
    "has_dense_kernel",
    "has_fast_kernel",
    "has_tiled_kernel",
    "joined_layout",
    "joined_tiles",
    "linear",
    "read_memory",
    "tile",
    "tiled_linear",
    "tiled_rows",
    "untile",
]
