"""How long rounding a decoder block's latents takes, forward and backward, and the search for the row scales that they
start from, of the whole block as ternary and as 4-bit: native kernel and torch operations, in turn.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/latents.py --rounds 20

Shapes are those of a block of SmolLM2-135M: half of the channels 1-bit, four tenths ternary, a tenth 4-bit, drawn.
"""

import argparse
import statistics
import time
import unittest.mock

import torch
from distill_step import drawn_widths

from ptq161 import latent, mixed
from ptq161.allocator import kept_memory
from ptq161.binarize import FOUR_BIT, TERNARY
from ptq161.kernels import cpu_kernels

SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def main() -> None:
    """Print milliseconds a block, each way, and how many times longer torch's operations take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    draws = torch.Generator().manual_seed(0)
    latents = [drawn_widths(0.05 * torch.randn(shape, generator=draws), draws) for shape in SHAPES]
    has_kernel = latent.has_rounding_kernel
    print(f"{cpu_kernels()[0]}, {torch.get_num_threads()} threads, median of {arguments.rounds}")
    for dtype in (torch.float32, torch.bfloat16):
        upstream = [torch.randn(shape, generator=draws).to(dtype) for shape in SHAPES]
        seconds: dict[str, list[tuple[float, float]]] = {"kernel": [], "torch": []}
        with kept_memory(1 << 30):
            for turn in range(arguments.rounds + 1):
                for name, taken in (("kernel", has_kernel), ("torch", lambda *_: False)):
                    with unittest.mock.patch.object(latent, "has_rounding_kernel", taken):
                        began = time.perf_counter()
                        dense = [weight.dense(dtype) for weight in latents]
                        between = time.perf_counter()
                        for weight, value, gradient in zip(latents, dense, upstream, strict=True):
                            torch.autograd.grad(value, [weight.latent, weight.gain], gradient)
                        if turn:  # the first is not counted
                            seconds[name].append((between - began, time.perf_counter() - between))
        kernel, torch_ = (
            [1e3 * statistics.median(ways) for ways in zip(*found, strict=True)] for found in seconds.values()
        )
        for way, fast, slow in zip(("forward", "backward"), kernel, torch_, strict=True):
            kind = str(dtype).removeprefix("torch.")
            print(f"{kind:<9} {way:<9} kernel {fast:6.2f} ms  torch {slow:6.2f} ms  {slow / fast:4.1f} times as long")
    searches: dict[str, list[float]] = {"kernel": [], "torch": []}
    for turn in range(4):
        for name, taken in (("kernel", has_kernel), ("torch", lambda *_: False)):
            with unittest.mock.patch.object(mixed, "has_rounding_kernel", taken):
                began = time.perf_counter()
                for weight in latents:
                    for width in (TERNARY, FOUR_BIT):
                        mixed.best_scale(weight.latent.detach(), width, torch.ones(weight.latent.shape[1]))
                if turn:
                    searches[name].append(time.perf_counter() - began)
    fast, slow = (1e3 * statistics.median(found) for found in searches.values())
    print(f"search for row scales kernel {fast:6.0f} ms  torch {slow:6.0f} ms  {slow / fast:4.1f} times as long")


if __name__ == "__main__":
    main()
