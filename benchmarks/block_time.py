"""Where the time of one quantized block goes: by phase, and by kind of operation inside the learning steps.

.venv/bin/python benchmarks/block_time.py MODEL --calib TEXT [--block 0] [--samples 32 --seqlen 512 --epochs 4]
"""

import argparse
import time
from collections import Counter

import torch

from ptq161.config import CalibrationConfig, QuantConfig
from ptq161.data import calibration_tokens
from ptq161.machine import peak_rss_bytes
from ptq161.sources import open_dense
from ptq161.walk import Progress, prepare, walk

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "attention": ("aten::_scaled_dot_product",),
    "copies and casts": ("aten::copy_", "aten::index_copy", "aten::index_select", "aten::cat", "aten::clone"),
    "optimizer": ("Optimizer.step", "aten::addcdiv", "aten::addcmul", "aten::lerp", "aten::sqrt"),
}


def kind_of(operation: str) -> str:
    """Which row of the table an operation counts towards."""
    for kind, prefixes in KINDS.items():
        if operation.startswith(prefixes):
            return kind
    return "element-wise and rest"


def main() -> None:
    """Quantize one block twice: once timed, once profiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--compute", default="auto")
    arguments = parser.parse_args()

    source, tokenizer = open_dense(arguments.model)
    calibration = CalibrationConfig((arguments.calib,), arguments.samples, arguments.seqlen)
    tokens = calibration_tokens(calibration, tokenizer)
    config = QuantConfig().replaced({"epochs": arguments.epochs, "compute": arguments.compute})
    device = torch.device("cpu")
    prepared = prepare(source, tokens, config, (arguments.block, arguments.block + 1))

    marks: dict[str, list[float]] = {}

    def mark(progress: Progress) -> None:
        marks.setdefault(progress.phase, []).append(time.monotonic())

    (block,) = walk(prepared, tokens, config, device, on_progress=mark)
    total = block.record["seconds"]
    learning = (marks["learn"][-1] - marks["learn"][0]) * len(marks["learn"]) / (len(marks["learn"]) - 1)
    print(
        f"block {arguments.block} of {arguments.model}: {total:.1f} s with {torch.get_num_threads()} threads, "
        f"{arguments.samples} x {arguments.seqlen} tokens, {arguments.epochs} epochs"
    )
    print(f"objective {block.record['loss_first']:.6f} -> {block.record['loss_last']:.6f}, compute={arguments.compute}")
    print(f"  learning                {learning:6.1f} s  {learning / total:4.0%}")
    print(f"  targets and measuring   {total - learning:6.1f} s  {1 - learning / total:4.0%}  (four float32 passes)")

    with torch.profiler.profile() as profiler:
        list(walk(prepared, tokens, config, device))
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[kind_of(event.key)] += event.self_cpu_time_total
    everything = sum(times.values())
    print("share of operations' own time, whole block:")
    for kind, share in times.most_common():
        print(f"  {kind:<24}{share / everything:6.0%}")
    print(f"peak memory of the process, profiler included: {peak_rss_bytes() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
