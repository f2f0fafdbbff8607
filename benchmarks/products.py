"""Which arithmetic multiplies faster here: matrix products of a learning step in float32 and in bfloat16, turn by turn.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/products.py --tokens 1024

Shapes are those of SmolLM2-135M: one linear of a decoder block, and its head; each forward, and the gradient at its
weight. `compute=auto` takes bfloat16 where the processor multiplies it (docs/decisions/0025).
"""

import argparse
import statistics
import time

import torch

SHAPES = {"gate_proj": (1536, 576), "down_proj": (576, 1536), "head": (49152, 576)}


def main() -> None:
    """Print operations a second, the median of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    speeds: dict[tuple[str, str, torch.dtype], list[float]] = {}
    for turn in range(arguments.rounds + 1):
        for name, (rows, cols) in SHAPES.items():
            for dtype in (torch.float32, torch.bfloat16):
                x, weight = torch.randn(arguments.tokens, cols, dtype=dtype), torch.randn(rows, cols, dtype=dtype)
                y = torch.randn(arguments.tokens, rows, dtype=dtype)
                for kind, first, second in (("forward", x, weight.T), ("gradient at the weight", y.T, x)):
                    began = time.perf_counter()
                    first @ second
                    seconds = time.perf_counter() - began
                    if turn:  # the first is not counted
                        speed = 2 * arguments.tokens * rows * cols / seconds / 1e9
                        speeds.setdefault((name, kind, dtype), []).append(speed)
    print(f"{arguments.tokens} tokens, {torch.get_num_threads()} threads, median of {arguments.rounds}")
    print("billion operations a second:")
    for (name, kind, dtype), found in speeds.items():
        print(f"{name:<10} {kind:<24} {str(dtype).removeprefix('torch.'):<10} {statistics.median(found):8.1f}")


if __name__ == "__main__":
    main()
