"""Products of one linear on a GPU: dense bfloat16 and float16 against packed, and every launch that the kernel knows.

python benchmarks/gpu.py [--shape 4096x4096]... [--format mixed] [--dtype bfloat16] [--tokens 1 --tokens 8 ...] \
    [--out benchmarks/results/DATE-gpu.jsonl]

It needs the package on the path (PYTHONPATH=src is enough), torch with CUDA and Triton; no network and no model. Every
contender is checked against float64 first, then captured in a CUDA graph that uses each of its copies once; together
they are four times the L2, so weights are cold. A round replays every graph once, between two CUDA events. Median and
p10 over the rounds, of one product; GB/s are of the bytes in memory (packed) or of the dense weight, and of the file.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.nn import functional

from ptq161.binarize import reconstruct
from ptq161.evaluate.speed import FORMATS, random_layout, random_packed
from ptq161.kernels import gpu, tile
from ptq161.kernels.tiles import TiledWeight
from ptq161.packing import unpack

LLAMA_7B = ["4096x4096", "11008x4096", "4096x11008"]
LIMIT = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-5}
Calls = list[Callable[[], torch.Tensor]]


def copies(nbytes: int) -> int:
    """How many copies of a weight are together four times the L2."""
    return max(1, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // nbytes))


def graph_of(calls: Calls) -> torch.cuda.CUDAGraph:
    """All calls in one graph, after each has run once so that everything is compiled."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds_of(graph: torch.cuda.CUDAGraph, products: int) -> float:
    """One replay, per product."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    return 1e-3 * began.elapsed_time(ended) / products


def contenders(shape: tuple[int, int], format: str, dtype: torch.dtype, tokens: int) -> tuple[dict, int, int, int]:
    """Name -> calls over cold copies, each checked; and the bytes of the weight in the file, in tiles and dense."""
    packed = random_packed(random_layout(*shape, format), torch.Generator().manual_seed(0))
    file_bytes = sum(spec.nbytes for spec in packed.layout.specs().values())
    tiled = tile(packed)
    tiled = TiledWeight(tiled.layout, *[None if t is None else t.cuda() for t in (tiled.tiles, tiled.order, tiled.col)])
    exact = reconstruct(unpack(packed)).cuda()
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    expected = functional.linear(x.double(), exact.double())
    dense_bytes = exact.numel() * dtype.itemsize
    weights = [exact.to(dtype, copy=True) for _ in range(copies(dense_bytes))]
    tiles = [replace(tiled, tiles=tiled.tiles.clone()) for _ in range(copies(tiled.tiles.nbytes))]
    found: dict[str, Calls] = {"dense": [lambda w=w: functional.linear(x, w) for w in weights]}
    if tokens <= gpu.TOKENS:
        found["packed"] = [lambda w=w: gpu.multiply(x, w) for w in tiles]
        for launch in gpu.LAUNCHES:
            name = "packed " + json.dumps(asdict(launch))
            found[name] = [lambda w=w, launch=launch: gpu.multiply(x, w, None, launch) for w in tiles]
    found["dequantized"] = [lambda w=w: functional.linear(x, gpu.dequantize(w, dtype)) for w in tiles[:4]]
    for name, calls in found.items():
        error = float((calls[0]().double() - expected).norm() / expected.norm())
        assert error <= LIMIT[str(dtype).removeprefix("torch.")], f"{name}: relative error {error:.1e}"
    return found, file_bytes, tiled.tiles.nbytes, dense_bytes


def measure(shape: tuple[int, int], format: str, dtype: torch.dtype, tokens: int, rounds: int) -> list[dict]:
    """One row a contender; rounds are interleaved."""
    found, file_bytes, memory_bytes, dense_bytes = contenders(shape, format, dtype, tokens)
    graphs = {name: (graph_of(calls), len(calls)) for name, calls in found.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 3):
        for name, (graph, products) in graphs.items():
            seconds = seconds_of(graph, products)
            if turn >= 3:
                times[name].append(seconds)
    dense = median(times["dense"])
    rows = []
    for name, seconds in times.items():
        middle = median(seconds)
        rows.append(
            {
                "shape": list(shape),
                "format": format,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "weights": name,
                "median_us": 1e6 * middle,
                "p10_us": 1e6 * quantiles(seconds, n=10, method="inclusive")[0],
                "gb_s": 1e-9 * (dense_bytes if name == "dense" else memory_bytes) / middle,
                "file_gb_s": None if name == "dense" else 1e-9 * file_bytes / middle,
                "speedup": dense / middle,
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, and append rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="ROWSxCOLS; may be repeated (default: those of a 7B Llama)")
    parser.add_argument("--format", action="append", choices=FORMATS, help="default: both")
    parser.add_argument("--dtype", default="bfloat16", choices=LIMIT)
    parser.add_argument("--tokens", action="append", type=int, help="may be repeated (default 1, 4, 8, 16, 32, 512)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": gpu.triton.__version__}
    print(json.dumps(versions))
    for text in arguments.shape or LLAMA_7B:
        rows, cols = map(int, text.split("x"))
        for format in arguments.format or FORMATS:
            for tokens in arguments.tokens or (1, 4, 8, 16, 32, 512):
                dtype = getattr(torch, arguments.dtype)
                for row in measure((rows, cols), format, dtype, tokens, arguments.rounds):
                    print(
                        f"{text} {format} {tokens:4} {row['median_us']:9.1f} us {row['gb_s']:7.0f} GB/s "
                        f"{row['speedup']:5.2f}  {row['weights']}",
                        flush=True,
                    )
                    if arguments.out:
                        with arguments.out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(row | versions) + "\n")
                torch.cuda.empty_cache()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
