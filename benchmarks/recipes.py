"""One quantization per recipe on the same text, all else equal: bits, perplexity, minutes; one row of JSON each.

    .venv/bin/python benchmarks/recipes.py MODEL --table ingredients --calib TEXT[0%:90%] --ppl TEXT[90%:] \
        --seqlen 512 --work DIR --out rows.jsonl

Rows already in the output file are not computed again, and an interrupted quantization continues. `--seed` may be
repeated. Every model is evaluated as `ptq161 eval --mode dense` does it, the original included: in bfloat16 where the
processor multiplies it, else in float32. `--samples` and `--calib-seqlen` make all calibration smaller.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ptq161
from ptq161.arithmetic import products_dtype
from ptq161.config import Compute
from ptq161.data import evaluation_tokens
from ptq161.evaluate.perplexity import perplexity
from ptq161.sources import open_model

Recipe = Mapping[str, Any]  # keywords of ptq161.quantize
TIMES = "times the samples"  # in a recipe: a factor, no keyword
BLOCKS_ONLY = {"preset": "fast"}

TABLES: dict[str, dict[str, Recipe]] = {
    # What the presets give on the same 32 x 512 tokens.
    "presets": {
        "paper": {"preset": "paper", "epochs": 4},
        "fast": {"preset": "fast"},
        "best, the same tokens only": {"preset": "best", "distill_fresh": False},
    },
    # One ingredient of the blocks' stage changed at a time.
    "ingredients": {
        "mixed": BLOCKS_ONLY,
        "the same split for every linear": BLOCKS_ONLY | {"allocation": "uniform"},
        "the paper's loss": BLOCKS_ONLY | {"magnitude": "mse", "angular": True},
        "half the epochs": BLOCKS_ONLY | {"epochs": 2},
        "0.04 bits more": BLOCKS_ONLY | {"bits": 1.652},
        "latents three times faster": BLOCKS_ONLY | {"lr_latent": 0.06},
        "codes not learned": BLOCKS_ONLY | {"lr_latent": 0.0},
        "scales not learned": BLOCKS_ONLY | {"lr_scale": 0.0},
        "no learning": BLOCKS_ONLY | {"epochs": 0},
        "no learning, plain rounding": BLOCKS_ONLY | {"epochs": 1, "lr_latent": 0.0, "lr_scale": 0.0},
        "the paper's method": {"preset": "paper", "epochs": 4},
    },
    # As many learning steps, from more text; the passes that only measure take longer with it.
    "segments": {
        "four epochs": BLOCKS_ONLY,
        "twice the samples, two epochs": BLOCKS_ONLY | {"epochs": 2, TIMES: 2},
        "four times the samples, one epoch": BLOCKS_ONLY | {"epochs": 1, TIMES: 4},
    },
    # From few to many tokens of distillation.
    "tokens": {f"{count:,} tokens": {"preset": "best", "distill_tokens": count} for count in (65_536, 262_144)},
}


def main() -> None:
    """Run every recipe of a table that has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--table", choices=TABLES, required=True)
    parser.add_argument("--calib", action="append", required=True)
    parser.add_argument("--ppl", action="append", required=True)
    parser.add_argument("--seqlen", type=int, default=512, help="of the evaluation windows")
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--samples", type=int, default=32, help="of the calibration")
    parser.add_argument("--calib-seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--only", nargs="*", help="names of the recipes to run")
    parser.add_argument("--work", type=Path, required=True, help="folder for the packed models")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    dtype = products_dtype(Compute.AUTO, torch.device("cpu"))
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    finished = {(row["recipe"], row["seed"]) for row in rows}

    def evaluate(path: str | Path) -> dict[str, Any]:
        model, tokenizer = open_model(path, dtype=dtype, mode="dense")
        return {
            text: perplexity(model, evaluation_tokens(text, tokenizer), args.seqlen, max_windows=args.max_windows)
            for text in args.ppl
        }

    def record(recipe: str, seed: int | None, **row: Any) -> None:
        line = {
            "recipe": recipe,
            "seed": seed,
            "calib": args.calib,
            "calib_tokens": [args.samples, args.calib_seqlen],
            "threads": torch.get_num_threads(),
            "evaluated_in": str(dtype),
            **row,
        }
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({key: value for key, value in line.items() if key != "blocks"}), flush=True)

    if ("full precision", None) not in finished:
        record("full precision", None, perplexity=evaluate(args.model))
    for name, recipe in TABLES[args.table].items():
        for seed in args.seed or [0]:
            if (name, seed) in finished or (args.only and name not in args.only):
                continue
            folder = args.work / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            began = time.monotonic()
            result = {}
            if not folder.exists():
                keywords = dict(recipe)
                samples = args.samples * keywords.pop(TIMES, 1)
                text = {"calib": args.calib, "samples": samples, "seqlen": args.calib_seqlen, "seed": seed}
                result = ptq161.quantize(args.model, folder, **text, **keywords)
            keep = ("bits_per_weight", "seconds", "peak_rss_bytes", "distillation", "blocks")
            figures = {key: result.get(key) for key in keep}
            figures["seconds"] = time.monotonic() - began
            record(name, seed, settings=recipe, perplexity=evaluate(folder), **figures)


if __name__ == "__main__":
    main()
