"""Where a token's time goes: CPU time per kind of module while `generate` decodes, packed or dense.

    OMP_NUM_THREADS=1 python benchmarks/decode_profile.py PACKED_FOLDER [--dense float32|bfloat16] [--json]

Each module is credited with the time of its own forward without that of the modules in it, so the rows add up to the
whole; linears of the decoder blocks and the head are apart. What the hooks cost is in the rows; a token without them is
given below. Dispatch is what calls of packed linears cost beside their arithmetic, measured on one of 32 x 64.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

import ptq161
from ptq161.evaluate.speed import random_layout, random_packed
from ptq161.linear import PackedLinear

PROMPT = 16


def main() -> None:
    """Print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--dense", choices=("float32", "bfloat16"), help="unpacked, in this dtype")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of what is not packed (default: as stored)")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    dtype = args.dense or args.dtype
    model = ptq161.load(
        args.path, mode="dense" if args.dense else "packed", dtype=None if dtype is None else getattr(torch, dtype)
    )
    decode(model, 2)
    plain = median(decode(model, args.tokens) for _ in range(args.rounds))
    rows, calls = profile(model, args.tokens, args.rounds)
    result = {
        "model": args.path,
        "weights": args.dense or "packed",
        "threads": torch.get_num_threads(),
        "milliseconds": rows,
        "calls": calls,
        "milliseconds_hooked": sum(rows.values()),
        "milliseconds_plain": plain,
        "dispatch_milliseconds": None if args.dense else dispatch_cost() * calls["packed linears"],
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.path}, {result['weights']}, {result['threads']} thread(s), CPU milliseconds a token")
    for name, milliseconds in sorted(rows.items(), key=lambda row: -row[1]):
        print(f"{name:28}{calls.get(name, 0):6} calls{milliseconds:9.3f}")
    print(f"{'all, with hooks':28}{'':12}{result['milliseconds_hooked']:9.3f}")
    print(f"{'all, without hooks':28}{'':12}{plain:9.3f}")
    if not args.dense:
        print(f"{'dispatch of packed linears':28}{'':12}{result['dispatch_milliseconds']:9.3f}")


def decode(model: PreTrainedModel, tokens: int, on_prompt: Callable[[], None] = lambda: None) -> float:
    """CPU milliseconds a token of greedy decoding after a short prompt, the first token apart."""
    prompt = torch.arange(PROMPT)[None] + 5
    seconds = []
    for count in (1, tokens + 1):
        on_prompt()
        began = time.process_time()
        settings = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        seconds.append(time.process_time() - began)
    return 1e3 * (seconds[1] - seconds[0]) / tokens


def profile(model: PreTrainedModel, tokens: int, rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds and calls a token by kind of module: medians over rounds, the prompt's part taken off."""
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    children: list[float] = []  # time of finished modules inside each module that runs
    began: list[float] = []

    def before(module: nn.Module, *_: object) -> None:
        children.append(0.0)
        began.append(time.process_time())

    def after(module: nn.Module, *_: object) -> None:
        seconds = time.process_time() - began.pop()
        kind = kinds[module]
        spent[kind] += seconds - children.pop()
        calls[kind] += 1
        if children:
            children[-1] += seconds

    kinds = {module: kind_of(model, module) for module in model.modules()}
    handles = [module.register_forward_pre_hook(before) for module in kinds]
    handles += [module.register_forward_hook(after) for module in kinds]
    tables, counts = [], {}
    for _ in range(rounds):
        halves: list[dict[str, float]] = []

        def keep() -> None:
            halves.append(dict(spent))  # noqa: B023
            spent.clear()
            calls.clear()

        whole = decode(model, tokens, keep)
        prompt, all_tokens = halves[1], dict(spent)
        table = {kind: 1e3 * (all_tokens[kind] - prompt[kind]) / tokens for kind in all_tokens}
        tables.append(table | {"generate's own loop": whole - sum(table.values())})
        counts = {kind: round(calls[kind] / (tokens + 1)) for kind in calls}
    for handle in handles:
        handle.remove()
    return {kind: median(table[kind] for table in tables) for kind in tables[0]}, counts


def kind_of(model: PreTrainedModel, module: nn.Module) -> str:
    """Name of a table row."""
    if module is model.get_output_embeddings():
        return "head"
    if isinstance(module, PackedLinear):
        return "packed linears"
    if isinstance(module, nn.Linear):
        return "dense linears"
    return type(module).__name__


def dispatch_cost() -> float:
    """Milliseconds of a call of a packed linear so small that there is next to nothing to compute."""
    packed = random_packed(random_layout(32, 64, "mixed"), torch.Generator().manual_seed(0))
    linear, x = PackedLinear.of(packed).tile(), torch.randn(1, 1, 64)
    times = []
    with torch.no_grad():
        for _ in range(200):
            began = time.process_time()
            for _ in range(10):
                linear(x)
            times.append(1e2 * (time.process_time() - began))
    return median(times)


if __name__ == "__main__":
    main()
