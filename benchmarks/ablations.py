"""One quantization per departure from the published code, all else equal; perplexity on held-out text.

    .venv/bin/python benchmarks/ablations.py MODEL --calib TEXT[0%:90%] --ppl TEXT[90%:100%] --out results.jsonl

Rows already in the output file are not computed again. The model stays in memory: no checkpoint is written, the
weights evaluated are exactly those that one would hold (factors rounded to float16), in float32 arithmetic.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ptq161.binarize import QuantizedWeight, reconstruct
from ptq161.config import CalibrationConfig, QuantConfig
from ptq161.data import calibration_tokens, evaluation_tokens
from ptq161.dense import DenseModel
from ptq161.evaluate.perplexity import perplexity
from ptq161.inspection import predict
from ptq161.layout import ModelLayout
from ptq161.packing import COLUMN_TYPES, PackedWeight, unpack
from ptq161.sources import open_model
from ptq161.walk import QuantizedBlock, prepare, walk

PUBLISHED = {"statistic": "absmax", "salient_range": "row", "row_mean": True, "magnitude": "mse", "angular": True}
VARIANTS: dict[str, dict[str, object]] = {
    "published code": {},
    "statistic: mean |x| for max |x|": {"statistic": "absmean"},
    "statistic: OWQ's Hessian (Table 5)": {"statistic": "hessian"},
    "4-bit range: salient columns only": {"salient_range": "salient"},
    "no row mean (Eq. 9)": {"row_mean": False},
    "L2 norm for MSE (Eq. 5)": {"magnitude": "l2"},
    "no angular term (Table 7)": {"angular": False},
    "float32 arithmetic for bfloat16": {"compute": "float32"},
    "no learning": {"epochs": 0},
    "no mask": {"salient_ratio": 0.0, "bits": None},
    "salient ratio 5 % (Fig. 6)": {"salient_ratio": 0.05, "bits": None},
    "salient ratio 10 % (Fig. 6)": {"salient_ratio": 0.1, "bits": None},
    "salient ratio 30 % (Fig. 6)": {"salient_ratio": 0.3, "bits": None},
    "row scales not learned": {"lr_scale": 0.0},
    "angular factors not learned": {"lr_angular": 0.0},
    "plain signs (no mask, mean or learning)": {
        "salient_ratio": 0.0,
        "bits": None,
        "row_mean": False,
        "epochs": 0,
    },
}


def stored_weights(layout: ModelLayout, block: QuantizedBlock) -> dict[str, QuantizedWeight]:
    """One block's linears by full name, as a file would hold them."""
    weights = {}
    for name, spec in layout.linears.items():
        if name.startswith(f"{block.prefix}."):
            own = {tensor: block.packed[f"{name}.{tensor}"] for tensor in spec.specs()}
            if spec.columns_from is not None:
                own[COLUMN_TYPES] = block.packed[f"{spec.columns_from}.{COLUMN_TYPES}"]
            weights[name] = unpack(PackedWeight(spec.layout, own))
    return weights


def install(model: torch.nn.Module, layout: ModelLayout, block: QuantizedBlock) -> None:
    """Put one block's stored weights into the model."""
    for name, weight in stored_weights(layout, block).items():
        linear = model.get_submodule(name)
        linear.weight.data = reconstruct(weight).to(linear.weight.dtype)


def main() -> None:
    """Run every variant that has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--ppl", required=True, action="append")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--only", nargs="*", help="names of the variants to run")
    arguments = parser.parse_args()

    source, tokenizer = open_model(arguments.model, dtype=torch.float32)
    calibration = CalibrationConfig((arguments.calib,), arguments.samples, arguments.seqlen, arguments.seed)
    tokens = calibration_tokens(calibration, tokenizer)
    texts = {name: evaluation_tokens(name, tokenizer) for name in arguments.ppl}
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    finished = {row["variant"] for row in done}

    def record(variant: str, **row: object) -> None:
        line = json.dumps({"variant": variant, **row})
        with arguments.out.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def evaluate(model: PreTrainedModel) -> dict[str, dict[str, object]]:
        return {
            name: perplexity(model, text, arguments.seqlen, max_windows=arguments.max_windows)
            for name, text in texts.items()
        }

    if "full precision" not in finished:
        record("full precision", perplexity=evaluate(source))
    for variant, changes in VARIANTS.items():
        if variant in finished or (arguments.only and variant not in arguments.only):
            continue
        values = {"epochs": arguments.epochs, "seed": arguments.seed, **PUBLISHED, **changes}
        config = QuantConfig().replaced(values)
        model = copy.deepcopy(source)
        device = torch.device("cpu")
        began = time.monotonic()
        prepared = prepare(DenseModel.of(source), tokens, config, None)
        records = []
        for block in walk(prepared, tokens, config, device):
            install(model, prepared.layout, block)
            records.append(block.record)
        seconds = time.monotonic() - began
        record(
            variant,
            changes=changes,
            bits_per_weight=prepared.layout.bits_per_weight,
            salient_ratio=predict(model, prepared.layout, None)["salient_ratio"],
            perplexity=evaluate(model),
            blocks=records,
            seconds=seconds,
        )


if __name__ == "__main__":
    main()
