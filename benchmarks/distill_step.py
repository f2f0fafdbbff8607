"""How long a step of distillation takes as it is and otherwise, turn by turn: with its memory taken anew, with eager
attention, with latents rounded by torch operations; with --other-products, in the other of float32 and bfloat16.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/distill_step.py MODEL --seqlen 512 --rounds 3

Which channels have which width does not matter for the time: here they are drawn, half of them 1-bit, four tenths
ternary, a tenth 4-bit. The text is random tokens. Two steps that are not counted come first in every round.
"""

import argparse
import statistics
import time
import unittest.mock
from contextlib import ExitStack, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from ptq161 import latent
from ptq161.allocator import kept_memory
from ptq161.arithmetic import products_dtype
from ptq161.binarize import FOUR_BIT, ONE_BIT, TERNARY, ColumnGroup, QuantizedWeight, nearest_level, stored
from ptq161.causal import fast_attention
from ptq161.config import Compute, QuantConfig
from ptq161.discovery import block_linears, decoder_blocks
from ptq161.distill import Distillation
from ptq161.latent import LatentWeight
from ptq161.sources import open_model
from ptq161.student import memory_bytes, student_of

UNCOUNTED = 2  # steps of each turn
VARIANTS = 5  # at most
SHARES = {ONE_BIT: 0.5, TERNARY: 0.4, FOUR_BIT: 0.1}


def drawn_widths(weight: Tensor, generator: torch.Generator) -> LatentWeight:
    """A linear with its channels divided at random."""
    cols = weight.shape[1]
    order = torch.randperm(cols, generator=generator)
    ends = torch.tensor(list(SHARES.values())).cumsum(0).mul(cols).round().long()
    groups = []
    for width, columns in zip(SHARES, order.tensor_split(ends[:-1].tolist()), strict=True):
        columns = columns.sort().values
        part = weight[:, columns]
        scale = stored(part.abs().mean(dim=1, keepdim=True))
        groups.append(ColumnGroup(columns, width, nearest_level(part / scale, width).to(torch.int8), scale))
    return LatentWeight.of(weight, QuantizedWeight(tuple(groups)))


def main() -> None:
    """Print the seconds of a step, both ways, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=QuantConfig().distill_batch_size)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other-products", action="store_true", help="minutes a step where bfloat16 is emulated")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each round")
    arguments = parser.parse_args()

    model, _ = open_model(arguments.model, dtype=torch.float32)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    prefix, blocks = decoder_blocks(model)
    linears: dict[str, nn.Linear] = {
        f"{prefix}.{index}.{name}": linear
        for index, block in enumerate(blocks)
        for name, linear in block_linears(model, index, block).items()
    }
    dtype = products_dtype(Compute.AUTO, torch.device("cpu"))
    latents = {name: drawn_widths(linear.weight, generator) for name, linear in linears.items()}
    student = student_of(model, latents, dtype)
    steps = arguments.rounds * VARIANTS * (UNCOUNTED + arguments.steps)
    config = QuantConfig().replaced(
        {
            "distill_batch_size": arguments.batch_size,
            "distill_tokens": steps * arguments.batch_size * arguments.seqlen,
            "distill_redraw": 0.0,
        }
    )
    samples = torch.randint(
        model.config.vocab_size, (steps * arguments.batch_size, arguments.seqlen), generator=generator
    )
    run = Distillation(model, student, samples, config)
    weights = sum(linear.weight.numel() for linear in linears.values())
    expected = memory_bytes(model, weights, arguments.seqlen, config, dtype)
    began, seconds = 0.0, []

    def on_step(step: int, of: int, loss: float) -> None:
        nonlocal began
        seconds.append(time.monotonic() - began)
        began = time.monotonic()

    def stop_after(step: int) -> None:
        if run.step == step:
            raise StopIteration

    def as_it_is() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(fast_attention(model, samples.device))
        stack.enter_context(kept_memory(expected))
        return stack

    def eager() -> ExitStack:
        stack = as_it_is()
        model.set_attn_implementation("eager")
        return stack

    def other_products() -> ExitStack:
        stack = as_it_is()
        stack.callback(setattr, run, "student", student)
        run.student = replace(student, dtype=other)
        return stack

    def torch_rounding() -> ExitStack:
        stack = as_it_is()
        stack.enter_context(unittest.mock.patch.object(latent, "has_rounding_kernel", lambda *_: False))
        return stack

    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    variants = {
        "as it is": as_it_is,
        "memory taken anew": lambda: fast_attention(model, samples.device),
        "eager attention": eager,
        "torch rounding": torch_rounding,
    }
    if arguments.other_products:
        variants[f"products in {str(other).removeprefix('torch.')}"] = other_products
    counted: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, variant in variants.items():
            seconds.clear()
            end = run.step + UNCOUNTED + arguments.steps
            with variant(), suppress(StopIteration):
                began = time.monotonic()
                run.run(on_step, lambda end=end: stop_after(end))
            counted[name] += seconds[UNCOUNTED:]
    medians = {name: statistics.median(times) for name, times in counted.items()}
    tokens = arguments.batch_size * arguments.seqlen
    print(f"a step of {tokens} tokens, {torch.get_num_threads()} threads, median of {len(counted['as it is'])}")
    for name, median in medians.items():
        share = median / medians["as it is"]
        print(f"{name:<20} {median:6.2f} s  {tokens / median:6.1f} tokens/s  {share:.2f} times as long")


if __name__ == "__main__":
    main()
