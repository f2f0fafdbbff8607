"""How fast one linear is: dense float32 and bfloat16 against packed, in one interleaved run with cold weights.

Every contender takes its turn in every round, so that whatever else the machine does meets all of them alike. A turn is
a short burst of calls, the first of which is not counted: it warms code, which a model's other layers would have done.
Weights are cold unless asked for hot: each has copies that together are four times the last-level cache, and every
call uses the next copy. What DRAM can deliver is a contender too: a loop that reads as many bytes as the packed weight
has in memory, in pages of the same size (huge ones, as a loaded model's).

What is timed is the call a module makes: the op, with everything it checks and rounds. Figures that sum a run up are
made of the p10, which on a machine that others use says what it does when left alone. With one thread, the time that
the thread ran is given beside the time that passed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq161.binarize import CODE_WIDTHS
from ptq161.errors import InputError
from ptq161.kernels import ReadyWeight, TileMemory, cpu_kernels, linear, read_memory, tile
from ptq161.packing import (
    COLUMN_TYPES,
    GroupLayout,
    LinearLayout,
    PackedWeight,
    codes_per_byte,
    pack_codes,
    type_width,
)

Call = Callable[[Tensor], object]

FORMATS = ("mixed", "paper", "int8")
READ = "DRAM read"
BURST = 4
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_DEFAULT_CACHE = 32 * 2**20  # where the system does not say
_TIMES_CACHE = 4


def bench_shape(
    rows: int,
    cols: int,
    *,
    tokens: Sequence[int] = (1, 128),
    rounds: int = 40,
    format: str = "mixed",
    hot: bool = False,
) -> dict[str, Any]:
    """Time products of `tokens` rows of activations with a random (rows, cols) weight, on the CPU, in torch's threads.

    rounds: bursts of each contender for one token; long inputs get fewer, but two at least. format: "mixed" (46 % 1bit,
    11 % 4bit, ternary; row scales only: 1.61 bits, divided much as `fast` divides SmolLM2-135M), "paper" (20 % 4bit,
    1bit; all vectors) or "int8" (a head: 8bit, a row scale). hot: one copy of each weight, so that what fits stays in
    the caches.

    Returns the command's JSON: for each number of tokens and contender median and p10 in microseconds, and from the p10
    GFLOP/s and, for packed weights, GB/s of the bytes in the file and in memory. The contract's fields follow.

    Raises InputError for sizes out of range or an unknown format.
    """
    for name, value in (("rows", rows), ("cols", cols), ("rounds", rounds), *(("tokens", count) for count in tokens)):
        if value < 1:
            raise InputError(f"{name}={value} is out of range: expected 1 or more")
    layout = random_layout(rows, cols, format)
    packed = random_packed(layout, torch.Generator().manual_seed(0))
    file_bytes = sum(spec.nbytes for spec in layout.specs().values())
    cold_bytes = 0 if hot else _cache_bytes() * _TIMES_CACHE
    contenders, memory_bytes = _contenders(packed, cold_bytes)
    measured: list[dict[str, Any]] = []
    for count in tokens:
        x = torch.randn(count, cols, generator=torch.Generator().manual_seed(0))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders if count == 1 or name != READ}
        for _ in range(max(2, rounds // count)):
            for name, seconds in times.items():
                dtype, call = contenders[name]
                seconds += _burst(call, x.to(dtype))
        measured += [
            _row(name, count, rows * cols, seconds, file_bytes, memory_bytes) for name, seconds in times.items()
        ]
    return {
        "shape": [rows, cols],
        "format": format,
        "threads": torch.get_num_threads(),
        "kernels": list(cpu_kernels()),
        "cold_bytes": cold_bytes,
        "weight_bytes": file_bytes,
        "memory_bytes": memory_bytes,
        "dram_gb_s": next((row["memory_gb_s"] for row in measured if row["weights"] == READ), None),
        "measured": measured,
        **_summary(measured, tokens),
    }


def random_layout(rows: int, cols: int, format: str) -> LinearLayout:
    """Group sizes of the named format, for as many columns as there are. Raises InputError for an unknown name."""
    if format == "paper":
        counts = {"1bit": cols - int(0.198 * cols), "4bit": int(0.198 * cols)}
    elif format == "mixed":
        signs, four = int(0.46 * cols) // 8 * 8, int(0.11 * cols) // 2 * 2
        counts = {"1bit": signs, "ternary": cols - signs - four, "4bit": four}
    elif format == "int8":
        counts = {"8bit": cols}
    else:
        raise InputError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
    paper = format == "paper"
    return LinearLayout(
        rows,
        tuple(
            GroupLayout(w, n, zero=paper and w == "4bit", mean=paper and w == "1bit", col=paper and w == "1bit")
            for w, n in counts.items()
            if n
        ),
    )


def random_packed(layout: LinearLayout, generator: torch.Generator) -> PackedWeight:
    """A weight with random codes and small random factors, without ever being dense."""
    tensors: dict[str, Tensor] = {}
    for name, spec in layout.specs().items():
        if name == COLUMN_TYPES:
            sizes = torch.tensor([group.cols for group in layout.groups])
            types = torch.arange(len(sizes)).repeat_interleave(sizes)[torch.randperm(layout.cols, generator=generator)]
            tensors[name] = pack_codes(types, type_width(len(sizes)))
        elif spec.dtype == torch.uint8:
            group = layout.groups[int(name.rpartition("_")[2]) if "_" in name else 0]
            count, codes = CODE_WIDTHS[group.width].count, layout.rows if name.startswith("zero_") else group.cols
            per_byte = codes_per_byte(count)
            packed_codes = torch.randint(count**per_byte, spec.shape, generator=generator, dtype=torch.uint8)
            last = codes - (spec.shape[-1] - 1) * per_byte  # codes in a row's last byte; the rest of it is padding
            packed_codes[..., -1] = packed_codes[..., -1].int() % count**last
            tensors[name] = packed_codes
        else:
            tensors[name] = (0.02 * torch.rand(spec.shape, generator=generator) / layout.cols**0.5).half()
    return PackedWeight(layout, tensors)


def _contenders(packed: PackedWeight, cold_bytes: int) -> tuple[dict[str, tuple[torch.dtype, Call]], int]:
    """Name -> activations' dtype and a call that uses the next copy of the weight; and the packed bytes in memory."""
    dense = torch.randn(packed.layout.rows, packed.layout.cols, generator=torch.Generator().manual_seed(1))
    contenders: dict[str, tuple[torch.dtype, Call]] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        copies = cycle([dense.to(dtype, copy=True) for _ in range(_copies(dense.numel() * dtype.itemsize, cold_bytes))])
        contenders[name] = (dtype, _dense_call(copies))
    if not cpu_kernels():
        contenders["packed"] = (torch.float32, lambda x: linear(x, packed))
        return contenders, sum(tensor.nbytes for tensor in packed.tensors.values())
    tiled, memory = tile(packed), TileMemory()
    nbytes = sum(tensor.nbytes for tensor in (tiled.tiles, tiled.order, tiled.col) if tensor is not None)
    tiles = [memory.take(*tiled.tiles.shape).copy_(tiled.tiles) for _ in range(_copies(nbytes, cold_bytes))]
    weights = cycle([ReadyWeight(replace(tiled, tiles=copy)) for copy in tiles])
    contenders["packed"] = (torch.float32, lambda x: next(weights).linear(x, None, exact=False))
    contenders["packed float32"] = (torch.float32, lambda x: next(weights).linear(x, None, exact=True))
    words = cycle([memory.take(1, -(-nbytes // 64) * 64).fill_(1).view(torch.int64) for _ in tiles])
    contenders[READ] = (torch.float32, lambda x: read_memory(next(words), torch.get_num_threads()))
    return contenders, nbytes


def _dense_call(copies: Iterator[Tensor]) -> Call:
    return lambda x: functional.linear(x, next(copies))


def _copies(nbytes: int, cold_bytes: int) -> int:
    return max(1, -(-cold_bytes // nbytes))


def _cache_bytes() -> int:
    text = _CACHE.read_text().strip() if _CACHE.exists() else ""
    return int(text[:-1]) * 2**10 if text.endswith("K") else _DEFAULT_CACHE


def _burst(call: Call, x: Tensor) -> list[tuple[float, float]]:
    """Seconds by the clock and seconds that this thread ran, of every call of a burst but the first."""
    times = []
    with torch.inference_mode():
        for _ in range(1 + BURST):
            began, began_cpu = time.perf_counter(), time.thread_time()
            call(x)
            cpu = time.thread_time() - began_cpu
            times.append((time.perf_counter() - began, cpu))
    return times[1:]


def _row(
    name: str, tokens: int, weights: int, times: list[tuple[float, float]], file_bytes: int, memory_bytes: int
) -> dict[str, Any]:
    seconds = [wall for wall, _ in times]
    middle, p10 = median(seconds), quantiles(seconds, n=10, method="inclusive")[0]
    packed, read = name.startswith("packed"), name == READ
    return {
        "weights": name,
        "tokens": tokens,
        "calls": len(times),
        "median_us": 1e6 * middle,
        "p10_us": 1e6 * p10,
        "cpu_us": 1e6 * median(cpu for _, cpu in times) if torch.get_num_threads() == 1 else None,
        "gflop_s": None if read else 2e-9 * weights * tokens / p10,
        "gb_s": 1e-9 * file_bytes / p10 if packed else None,
        "memory_gb_s": 1e-9 * memory_bytes / p10 if packed or read else None,
    }


def _summary(measured: list[dict[str, Any]], tokens: Sequence[int]) -> dict[str, Any]:
    """The contract's fields: a token is one product; `speedup` is against the faster of the two dense ones."""
    speed = {(row["weights"], row["tokens"]): row["tokens"] * 1e6 / row["p10_us"] for row in measured}
    row = next((row for row in measured if row["weights"] == "packed" and row["tokens"] == 1), None)
    decode, prefill = speed.get(("packed", 1)), speed.get(("packed", max(tokens))) if max(tokens) > 1 else None
    dense = max(speed["float32", 1], speed["bfloat16", 1]) if decode else None
    return {
        "decode_tok_s": decode,
        "prefill_tok_s": prefill,
        "dense_decode_tok_s": dense,
        "speedup": decode / dense if decode and dense else None,
        "gb_s": row["gb_s"] if row else None,
    }
