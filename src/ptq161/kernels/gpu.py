"""The GPU kernels behind `ptq161::tiled_linear`: when a Triton program multiplies, and when torch does.

A few tokens are multiplied by the packed weight in one launch. For more, the weight is written out once in the
activations' dtype and torch multiplies; it is gone when the call returns. Nothing waits for the GPU, no size depends on
data and nothing is tuned while it runs, so a call can be captured in a CUDA graph once it has run (compiled) before.

Registered for CUDA where torch has CUDA and Triton is installed (kernels/__init__.py). Activations are exact: int8 is
for CPUs only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ptq161.binarize import CODE_WIDTHS
from ptq161.kernels import triton as programs
from ptq161.kernels.ops import LIBRARY
from ptq161.kernels.tiled import check, check_weight, from_integers, reference
from ptq161.kernels.tiles import TiledWeight, code_bits, group_offsets, tile_count
from ptq161.packing import GroupLayout, LinearLayout

TOKENS = 32  # up to so many are multiplied packed: by the count of operations, to be measured (benchmarks/gpu.py)
MOST_BITS = 4  # of a code that `programs.multiply` takes; 8-bit heads are written out
GROUPS = 4  # column groups that `programs.multiply` has arguments for
CAPABILITY = (8, 0)  # tensor cores for bfloat16
_TOKENS_AT_ONCE = 8
_COLUMNS = 128
_DOT_TYPES = {torch.float32: tl.bfloat16, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Launch:
    """How `programs.multiply` divides a weight: rows of a program, its warps, and stages of its loads."""

    rows: int
    warps: int
    stages: int

    @property
    def units(self) -> int:
        """Units that a warp takes at once: 16, so that its 32 lanes hold the activations of one plane."""
        return 16


# All that benchmarks/gpu.py tries. The choice among them is `launch_for`, the same on every machine and in every run:
# timing them at the first call would make results depend on the machine's mood, and cannot be done in a CUDA graph.
LAUNCHES = (
    *[Launch(16, 2, 2), Launch(16, 4, 2), Launch(16, 8, 2), Launch(16, 4, 3)],
    *[Launch(32, 2, 2), Launch(32, 4, 2), Launch(32, 8, 2), Launch(32, 4, 3)],
)


def launch_for(rows: int, tokens: int) -> Launch:
    """More rows where there are programs enough without, and where registers last (8 tokens of 32 rows spill)."""
    return Launch(rows=32 if rows >= 4096 and tokens <= 4 else 16, warps=4, stages=2)


def runs(weight: TiledWeight, dtype: torch.dtype) -> bool:
    """Whether the programs here multiply such a weight by activations of this dtype; the reference does the rest."""
    tiles = weight.tiles
    able = tiles.device.type != "cuda" or torch.cuda.get_device_capability(tiles.device) >= CAPABILITY
    fits = len(weight.layout.groups) <= GROUPS and tiles.numel() < 2**31
    return able and fits and dtype in _DOT_TYPES


def fits_mantissa(layout: LinearLayout) -> bool:
    """Whether `multiply` can take every group: its digits become mantissa bits, of which bfloat16 has 7."""
    return all(code_bits(CODE_WIDTHS[group.width]) <= MOST_BITS for group in layout.groups)


def multiply(x: Tensor, weight: TiledWeight, bias: Tensor | None = None, launch: Launch | None = None) -> Tensor:
    """The product by the packed weight, for any number of tokens. Shapes and dtypes as in `ptq161::tiled_linear`.

    Raises InputError for tensors that do not fit.
    """
    check(x, weight, bias)
    layout = weight.layout
    x = x.contiguous()
    tokens = x.numel() // layout.cols
    launch = launch or launch_for(layout.rows, tokens)
    y = x.new_empty((*x.shape[:-1], layout.rows))
    if tokens:
        sizes = [group.cols for group in layout.groups]
        at_once = min(_TOKENS_AT_ONCE, 1 << (tokens - 1).bit_length())
        programs.multiply[-(-layout.rows // launch.rows), -(-tokens // at_once)](
            x,
            weight.tiles,
            weight.order,
            weight.col,
            None if bias is None else bias.contiguous(),
            y,
            layout.rows,
            layout.cols,
            tokens,
            weight.tiles.shape[1],
            *sizes,
            *[0] * (GROUPS - len(sizes)),
            GROUPS=_groups(layout),
            SPLIT=x.dtype == torch.float32,
            DOT=_DOT_TYPES[x.dtype],
            T=at_once,
            R=launch.rows,
            S=launch.warps,
            KW=launch.units,
            INTERPRETED=_interpreted(),
            num_warps=launch.warps,
            num_stages=launch.stages if x.dtype != torch.float32 else 1,  # its gathers would be staged, too
        )
    return y


def dequantize(weight: TiledWeight, dtype: torch.dtype) -> Tensor:
    """W as (rows, cols) in `dtype`, each weight rounded once. Raises InputError for tensors that do not fit."""
    check_weight(weight)
    layout = weight.layout
    dense = torch.empty((layout.rows, layout.cols), dtype=dtype, device=weight.tiles.device)
    first = 0
    for index, group in enumerate(layout.groups):
        codes, vectors = group_offsets(layout)[index]
        programs.dequantize[tile_count(layout), -(-group.cols // _COLUMNS)](
            weight.tiles,
            weight.order,
            weight.col,
            dense,
            layout.rows,
            layout.cols,
            weight.tiles.shape[1],
            codes,
            vectors,
            first,
            group.cols,
            GROUP=_group(group),
            COLUMNS=_COLUMNS,
        )
        first += group.cols
    return dense


@lru_cache(maxsize=4096)
def _groups(layout: LinearLayout) -> tuple[tuple[int, int, int, bool, bool], ...]:
    return tuple(map(_group, layout.groups))


def _group(group: GroupLayout) -> tuple[int, int, int, bool, bool]:
    """What is compiled into a program of this group."""
    width = CODE_WIDTHS[group.width]
    return code_bits(width), width.lowest, width.step, group.zero, group.mean


def _interpreted() -> bool:
    return not isinstance(programs.multiply, triton.JITFunction)


def tiled_linear(
    x: Tensor,
    tiles: Tensor,
    order: Tensor | None,
    col: Tensor | None,
    bias: Tensor | None,
    layout: Sequence[int],
    exact: bool,
) -> Tensor:
    """The op on a GPU; `exact` or not is the same here."""
    weight = TiledWeight(from_integers(layout), tiles, order, col)
    if not runs(weight, x.dtype):
        return reference(x, tiles, order, col, bias, layout, exact)
    if x.numel() <= TOKENS * weight.layout.cols and fits_mantissa(weight.layout):
        return multiply(x, weight, bias)
    check(x, weight, bias)
    dense = dequantize(weight, x.dtype)
    return functional.linear(x, dense, None if bias is None else bias.to(x.dtype)).to(x.dtype)


def tiled_dequantize(tiles: Tensor, order: Tensor | None, col: Tensor | None, layout: Sequence[int]) -> Tensor:
    """The op on a GPU, float32."""
    return dequantize(TiledWeight(from_integers(layout), tiles, order, col), torch.float32)


def register(key: str = "CUDA", library: Any = LIBRARY) -> None:
    """Make these the ops' kernels on a device."""
    library.impl("tiled_linear", tiled_linear, key)
    library.impl("tiled_dequantize", tiled_dequantize, key)
