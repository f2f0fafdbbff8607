"""Where the processor time of a run goes, alone or as ranks: one JSON row per rank, seconds by phase.

    .venv/bin/python benchmarks/rank_time.py MODEL OUT --calib text.txt
    torchrun --nproc-per-node 2 benchmarks/rank_time.py MODEL OUT --calib text.txt

Preset fast, 8 samples of 256 tokens, 2 epochs, steps of 2 samples, seed 0. Processor time, because on a busy machine
the clock says little; what a rank waits for others is not in it.
"""

import argparse
import json
import time
from collections import defaultdict

import torch

from ptq161 import pipeline, ranks


def main() -> None:
    """Quantize once and print what each phase took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--calib", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, float] = defaultdict(float)
    phase, since = "read", time.process_time()

    def turn(to: str) -> None:
        nonlocal phase, since
        now = time.process_time()
        seconds[phase] += now - since
        phase, since = to, now

    with ranks.joined("cpu"):
        pipeline.quantize(
            args.model,
            args.out,
            calib=args.calib,
            preset="fast",
            samples=8,
            seqlen=256,
            epochs=2,
            batch_size=2,
            device="cpu",
            overwrite=True,
            restart=True,
            on_progress=lambda progress: turn(progress.phase),
        )
        turn("end")
        row = {"rank": ranks.rank(), "ranks": ranks.count(), "cpu_seconds": sum(seconds.values())}
        print(json.dumps(row | {name: round(value, 2) for name, value in seconds.items()}), flush=True)


if __name__ == "__main__":
    main()
