"""Where the time of one quantized block goes: by phase, and by kind of operation inside the learning steps.

.venv/bin/python benchmarks/block_time.py MODEL --calib TEXT [--preset paper] [--block 0]
    [--samples 32 --seqlen 512 --epochs 4]

Turn by turn with the attention of `causal` and with the model's own, medians of `--rounds`; then once profiled.
"""

import argparse
import statistics
import time
from collections import Counter
from contextlib import nullcontext

import torch

from ptq161.causal import fast_attention
from ptq161.config import CalibrationConfig, preset_named
from ptq161.data import calibration_tokens
from ptq161.machine import peak_rss_bytes
from ptq161.sources import open_dense
from ptq161.walk import Progress, prepare, walk

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul"),
    "attention": ("_Causal", "aten::bmm", "aten::_softmax"),
    "rounding": ("_Rounded",),
    "copies and casts": ("aten::copy_", "aten::index_copy", "aten::index_select", "aten::cat", "aten::clone"),
    "optimizer": (
        "Optimizer.step",
        "aten::_fused_adamw_",
        "aten::addcdiv",
        "aten::addcmul",
        "aten::lerp",
        "aten::sqrt",
    ),
}


def kind_of(operation: str) -> str:
    """Which row of the table an operation counts towards."""
    for kind, prefixes in KINDS.items():
        if operation.startswith(prefixes):
            return kind
    return "element-wise and rest"


def main() -> None:
    """Quantize one block with either attention in turn, then once profiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()

    source, tokenizer = open_dense(arguments.model)
    calibration = CalibrationConfig((arguments.calib,), arguments.samples, arguments.seqlen)
    tokens = calibration_tokens(calibration, tokenizer)
    settings = {"epochs": arguments.epochs, "compute": arguments.compute}
    config = preset_named(arguments.preset).quant.replaced(settings)
    device = torch.device("cpu")

    def quantized(causal: bool) -> tuple[float, float, dict[str, float]]:
        """Seconds of the block and of its learning steps, and its record."""
        learned: list[float] = []

        def mark(progress: Progress) -> None:
            if progress.phase == "learn":
                learned.append(time.monotonic())

        with fast_attention(source.skeleton, device) if causal else nullcontext():
            prepared = prepare(source, tokens, config, (arguments.block, arguments.block + 1))
            (block,) = walk(prepared, tokens, config, device, on_progress=mark)
        learning = (learned[-1] - learned[0]) * len(learned) / (len(learned) - 1)
        return block.record["seconds"], learning, block.record

    print(
        f"block {arguments.block} of {arguments.model}, {arguments.preset}: {torch.get_num_threads()} threads, "
        f"{arguments.samples} x {arguments.seqlen} tokens, {arguments.epochs} epochs, compute={arguments.compute}"
    )
    times: dict[str, list[tuple[float, float]]] = {"causal attention": [], "the model's own": []}
    for _ in range(arguments.rounds):
        for name, taken in times.items():
            total, learning, record = quantized(causal=name == "causal attention")
            taken.append((total, learning))
            print(f"  {name:<18}objective {record['loss_first']:.6f} -> {record['loss_last']:.6f}")
    for name, taken in times.items():
        total, learning = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
        print(
            f"  {name:<18}{total:6.1f} s, {learning:.1f} of them learning, the others four float32 passes and the start"
        )

    with torch.profiler.profile() as profiler:
        quantized(causal=True)
    kinds: Counter[str] = Counter()
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total
    everything = sum(kinds.values())
    print("share of operations' own time, whole block:")
    for kind, share in kinds.most_common():
        print(f"  {kind:<24}{share / everything:6.0%}")
    print(f"peak memory of the process, profiler included: {peak_rss_bytes() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
