"""How far a baseline's perplexity hangs on rounding: the same run again, the embedding changed in its last bits.

    .venv/bin/python benchmarks/spread.py MODEL --calib TEXT[0%:90%] --ppl TEXT --methods billm,gptq-w3g128 \
        --out results.jsonl

Draw 0 is the model as it is; in the others each weight of the embedding is multiplied by 1 + NOISE * a normal number,
about what float32 rounds off. What the model predicts does not change visibly, but codes that are chosen one after
another may fall out differently, and then so may all that follow. Rows already in the output file are not computed
again.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from ptq161.baselines import apply_baseline
from ptq161.config import CalibrationConfig
from ptq161.data import calibration_tokens, evaluation_tokens
from ptq161.evaluate.perplexity import perplexity
from ptq161.methods import BASELINES
from ptq161.sources import open_model

NOISE = 1e-7


def main() -> None:
    """Fill the output file draw by draw; then print what each method's perplexities are spread over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", action="append", required=True)
    parser.add_argument("--ppl", required=True)
    parser.add_argument("--methods", required=True, type=lambda text: text.split(","))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    lines = arguments.out.read_text(encoding="utf-8").splitlines() if arguments.out.exists() else []
    rows = [json.loads(line) for line in lines]
    for draw in range(arguments.draws):
        for name in arguments.methods:
            if any((row["method"], row["draw"]) == (name, draw) for row in rows):
                continue
            model, tokenizer = open_model(arguments.model, dtype=torch.float32)
            embedding = model.get_input_embeddings().weight.data
            normal = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(draw))
            embedding.mul_(1 + NOISE * normal * (draw > 0))
            calibration = CalibrationConfig(tuple(arguments.calib), arguments.samples, arguments.seqlen)
            samples = calibration_tokens(calibration, tokenizer)
            result = apply_baseline(model, samples, BASELINES[name], seed=0, device=torch.device("cpu"))
            tokens = evaluation_tokens(arguments.ppl, tokenizer)
            found = perplexity(result.model, tokens, arguments.window, max_windows=arguments.max_windows)
            rows.append(
                {
                    "method": name,
                    "draw": draw,
                    "noise": NOISE if draw else 0.0,
                    "ppl": found["ppl"],
                    "windows": found["windows"],
                    "bits_per_weight": result.bits_per_weight,
                    "block_losses": [block["loss"] for block in result.blocks],
                    "calibration": [list(calibration.sources), *samples.shape],
                    "threads": torch.get_num_threads(),
                }
            )
            with arguments.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(rows[-1]) + "\n")
            print(f"{name} draw {draw}: {found['ppl']:.1f}", flush=True)
    for name in arguments.methods:
        found = [row["ppl"] for row in rows if row["method"] == name]
        least, median, most = min(found), statistics.median(found), max(found)
        print(f"{name:<20} {least:>10.1f} {median:>10.1f} {most:>10.1f}  (least, median, most of {len(found)} draws)")


if __name__ == "__main__":
    main()
