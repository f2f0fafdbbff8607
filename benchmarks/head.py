"""What an int8 head costs and gains: a packed model as it is and with embedding and head at 8 bits, one row of JSON.

    .venv/bin/python benchmarks/head.py PACKED --ppl TEXT --max-windows 8

PACKED has its head at 16 bits; the copy with an int8 head is made from it in a temporary folder. Perplexities are in
the dtype of the folder with both kinds of activations. Decoding is measured interleaved in this one process.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ptq161.data import evaluation_tokens
from ptq161.evaluate.model_speed import generation_speed
from ptq161.evaluate.perplexity import perplexity
from ptq161.inspection import inspect
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
    packed |= pack_vocabulary(model, layout.vocabulary)
    save_packed(out, model, layout, packed, dtype=None, run=run, tokenizer=tokenizer)


def main() -> None:
    """Print the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--ppl", required=True)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"keep": args.packed, "int8": Path(scratch) / "int8"}
        copy_with_int8_head(args.packed, folders["int8"])
        measured: dict[str, dict[str, Any]] = {}
        models: dict[str, PreTrainedModel] = {}
        for head, folder in folders.items():
            sizes = inspect(folder)
            measured[head] = {"file_bytes": sizes["file_bytes"], "vocabulary_bits": sizes["vocabulary_bits"]}
            for activations in ("float32", "int8"):
                models[head], tokenizer = open_model(folder, mode="packed", activations=activations)
                tokens = evaluation_tokens(args.ppl, tokenizer)
                result = perplexity(models[head], tokens, args.seqlen, max_windows=args.max_windows)
                measured[head][f"ppl_{activations}"] = result["ppl"]
        prompt = torch.randint(1000, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
        speeds: dict[str, list[float]] = {head: [] for head in models}
        for turn in range(args.rounds + 1):
            for head, model in models.items():
                _, decode = generation_speed(model, prompt, args.new_tokens)
                if turn:  # the first round only warms up
                    speeds[head].append(decode)
    for head, rates in speeds.items():
        measured[head]["decode_tok_s"] = median(rates)
    row = {"model": str(args.packed), "text": args.ppl, "windows": args.max_windows, "seqlen": args.seqlen}
    print(json.dumps(row | {"threads": torch.get_num_threads(), "head": measured}))


if __name__ == "__main__":
    main()
