"""Every CPU kernel that runs here against torch's float32, one token, weights cold, interleaved.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py [--shape 2048x8192] [--threads 1] [--rounds 40] [--json]

The op itself takes the fastest kernel; this shows what a processor without AVX-512 would get from the next one.
"""

import argparse
import json
import time
from dataclasses import replace
from itertools import cycle
from statistics import median, quantiles

import torch
from torch.nn import functional

from ptq161.evaluate.speed import random_layout, random_packed
from ptq161.kernels import TileMemory, cpu_kernels, tile
from ptq161.kernels.cpu import run_kernel

COLD_BYTES = 128 * 2**20  # four times the last-level cache of the machine of docs/results.md


def main() -> None:
    """Print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2048x8192")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = measure(*map(int, args.shape.split("x")), args.rounds, args.threads)
    rows = {
        name: {"median_us": 1e6 * median(found), "p10_us": 1e6 * quantiles(found, n=10)[0]}
        for name, found in times.items()
    }
    if args.json:
        print(json.dumps({"shape": args.shape, "threads": args.threads, "rounds": args.rounds, "measured": rows}))
        return
    for name, row in rows.items():
        ratio = rows["torch float32"]["median_us"] / row["median_us"]
        print(f"{name:16}{row['median_us']:10.1f} us, p10 {row['p10_us']:10.1f}, {ratio:6.2f} x float32")


@torch.inference_mode()
def measure(rows: int, cols: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each contender's calls."""
    packed = random_packed(random_layout(rows, cols, "mixed"), torch.Generator().manual_seed(0))
    dense = torch.randn(rows, cols)
    copies = cycle([dense.clone() for _ in range(max(1, COLD_BYTES // dense.nbytes))])
    tiled, memory = tile(packed), TileMemory()
    tiles = [
        memory.take(*tiled.tiles.shape).copy_(tiled.tiles) for _ in range(max(1, COLD_BYTES // tiled.tiles.nbytes))
    ]
    weights = cycle([replace(tiled, tiles=copy) for copy in tiles])
    x = torch.randn(1, cols)
    times: dict[str, list[float]] = {"torch float32": [], **{name: [] for name in cpu_kernels()}}
    for _ in range(rounds):
        for name, found in times.items():
            if name == "scalar" and len(found) > 3:
                continue  # the specification is not made to be fast
            began = time.perf_counter()
            if name == "torch float32":
                functional.linear(x, next(copies))
            else:
                run_kernel(x, next(weights), None, exact=False, kernel=name, threads=threads)
            found.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main()
