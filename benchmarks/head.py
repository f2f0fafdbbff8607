"""What an int8 head costs and gains: a model as it is and with embedding and head at 8 bits, one row of JSON.

    .venv/bin/python benchmarks/head.py MODEL --ppl TEXT --max-windows 8

A packed MODEL has its head at 16 bits; the copy with an int8 head is made from it in a temporary folder. Decoding is
measured interleaved in this one process: tokens by the clock, and the time that the processor ran, which a machine that
others use disturbs less. Of a dense MODEL only the perplexity is measured, with the weights rounded.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ptq161.binarize import EIGHT_BIT, reconstruct, symmetric_weight
from ptq161.data import evaluation_tokens
from ptq161.evaluate.perplexity import perplexity
from ptq161.hf import is_packed
from ptq161.inspection import inspect
from ptq161.linear import PackedLinear
from ptq161.saving import save_packed
from ptq161.sources import open_model
from ptq161.vocabulary import pack_vocabulary, vocabulary_specs


def copy_with_int8_head(source: Path, out: Path) -> None:
    """Write the packed checkpoint `source` anew, its embedding and head at 8 bits."""
    model, tokenizer = open_model(source, mode="packed")
    quantizer: Any = model.hf_quantizer
    layout = replace(quantizer.quantization_config.layout, vocabulary=vocabulary_specs(model))
    state = model.state_dict()
    packed = {name: state[name] for name in layout.tensor_specs() if name in state}
    run = json.loads((source / "run.json").read_text())
    packed |= pack_vocabulary(model.state_dict(), layout.vocabulary)
    save_packed(out, model, layout, packed, dtype=None, run=run, tokenizer=tokenizer)


def perplexities(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Of a packed model: all activations float32, int8 in the linears, and int8 in the linears and an int8 head."""
    model, tokenizer = open_model(folder, mode="packed", activations="float32")
    tokens = evaluation_tokens(args.ppl, tokenizer)
    head = {model.get_input_embeddings(), model.get_output_embeddings()}
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    found = {}
    for name, rounded in (("float32", set()), ("int8", set(packed) - head), ("int8_and_head", set(packed))):
        for module in packed:
            module.exact = module not in rounded
        found[f"ppl_{name}"] = perplexity(model, tokens, args.seqlen, max_windows=args.max_windows)["ppl"]
    return found


@torch.no_grad()
def dense_perplexities(args: argparse.Namespace) -> dict[str, float]:
    """Of a dense model, before and after its embedding and head are rounded."""
    model, tokenizer = open_model(args.model)
    tokens = evaluation_tokens(args.ppl, tokenizer)
    found = {"keep": perplexity(model, tokens, args.seqlen, max_windows=args.max_windows)["ppl"]}
    for name in vocabulary_specs(model):
        weight = model.get_parameter(f"{name}.weight")
        weight.copy_(reconstruct(symmetric_weight(weight, EIGHT_BIT)))
    return found | {"int8": perplexity(model, tokens, args.seqlen, max_windows=args.max_windows)["ppl"]}


def decode_times(model: PreTrainedModel, new_tokens: int) -> tuple[float, float]:
    """Seconds by the clock and seconds of processor time of one new token, the prompt's left out."""
    prompt = torch.randint(1000, (1, 16), generator=torch.Generator().manual_seed(0))
    times = []
    for count in (1, 1 + new_tokens):
        began, began_cpu = time.perf_counter(), time.process_time()
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)  # type: ignore[operator]
        times.append((time.perf_counter() - began, time.process_time() - began_cpu))
    (first, first_cpu), (all_tokens, all_cpu) = times
    return (all_tokens - first) / new_tokens, (all_cpu - first_cpu) / new_tokens


def compare(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Sizes, perplexity and decoding time of a packed model with either head."""
    measured: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"keep": Path(args.model), "int8": Path(scratch) / "int8"}
        copy_with_int8_head(folders["keep"], folders["int8"])
        for head, folder in folders.items():
            sizes = inspect(folder)
            measured[head] = {key: sizes[key] for key in ("file_bytes", "vocabulary_bits")} | perplexities(args, folder)
        models = {head: open_model(folder, mode="packed")[0] for head, folder in folders.items()}
        times: dict[str, list[tuple[float, float]]] = {head: [] for head in models}
        for turn in range(args.rounds + 1):
            for head, model in models.items():
                measurement = decode_times(model, args.new_tokens)
                times[head] += [measurement] if turn else []  # the first round only warms up
    for head, pairs in times.items():
        measured[head]["decode_ms"] = 1e3 * median(clock for clock, _ in pairs)
        measured[head]["decode_cpu_ms"] = 1e3 * median(cpu for _, cpu in pairs)
    return measured


def main() -> None:
    """Print the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ppl", required=True)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    row = {"model": args.model, "text": args.ppl, "windows": args.max_windows, "seqlen": args.seqlen}
    measured = compare(args) if is_packed(args.model) else dense_perplexities(args)
    print(json.dumps(row | {"threads": torch.get_num_threads(), "head": measured}))


if __name__ == "__main__":
    main()
