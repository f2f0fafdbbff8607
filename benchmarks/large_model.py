"""Quantize random LLaMA-shaped models of more and more blocks in a small address space, and watch the memory.

    .venv/bin/python benchmarks/large_model.py --work DIR                      # 8, 16 and 48 blocks: up to 2.6 billion
    .venv/bin/python benchmarks/large_model.py --work DIR --hidden 1024 --inner 2816 --blocks 8 16      # 0.27 billion

Models are made in bfloat16 in shards of at most 512 MB, and kept in DIR for another run. Each is quantized in a process
of its own under RLIMIT_AS, which counts mapped shards too. Prints one JSON row per model: predicted peak of anonymous
memory, what was seen (VmHWM and sampled RssAnon and RssFile of /proc/self/status), and fails if the anonymous peaks of
the models differ by more than 5 %.
"""

import argparse
import json
import random
import resource
import shutil
import string
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SHARD_BYTES = 512 * 10**6
VOCABULARY = 32_000
TOLERANCE = 0.05


def main() -> None:
    """Make, quantize, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5504)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 48])
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=32)
    parser.add_argument("--allocation", choices=("fisher", "uniform"), default="fisher", help="uniform: half the time")
    parser.add_argument("--limit", type=float, default=4.0, help="address space in GiB; 0 for none")
    parser.add_argument("--offload", action="store_true", help="keep streams in files")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(quantize(args, args.child)))
        return
    rows = []
    for blocks in args.blocks:
        make_model(folder_of(args, blocks), args.hidden, args.inner, blocks)
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(blocks)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    peaks = [row["anonymous_bytes"] for row in rows]
    spread = max(peaks) / min(peaks) - 1
    print(f"anonymous memory differs by {spread:.1%} from {args.blocks[0]} to {args.blocks[-1]} blocks")
    if spread > TOLERANCE:
        sys.exit(1)


def folder_of(args: argparse.Namespace, blocks: int) -> Path:
    """Where the model of so many blocks lies."""
    folder: Path = args.work / f"llama-{args.hidden}x{blocks}"
    return folder


def make_model(folder: Path, hidden: int, inner: int, blocks: int) -> None:
    """Write a random model, one shard in memory at a time, its tokenizer, and text."""
    if (folder / "model.safetensors.index.json").exists():
        return
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    shards: list[list[str]] = [[]]
    for name, tensor in tensors.items():
        if sum(tensors[other].nbytes for other in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        shard = {}
        for name in names:
            shape = tensors[name].shape
            value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / hidden**0.5
            shard[name] = value.to(torch.bfloat16)
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    config.save_pretrained(folder)
    characters = {character: index for index, character in enumerate(["<s>", *string.printable])}
    tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    source = random.Random(0)
    (folder / "text.txt").write_text("".join(source.choices(string.ascii_letters + " \n", k=10_000)))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def status() -> dict[str, int]:
    """The memory lines of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def quantize(args: argparse.Namespace, blocks: int) -> dict[str, Any]:
    """Quantize one model under the limit, sampling memory a hundred times a second."""
    if args.limit:
        limit = int(args.limit * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from ptq161 import pipeline

    folder = folder_of(args, blocks)
    out = args.work / f"packed-{blocks}"
    shutil.rmtree(out, ignore_errors=True)
    settings: dict[str, Any] = {
        "preset": args.preset,
        "calib": str(folder / "text.txt"),
        "samples": args.samples,
        "seqlen": args.seqlen,
        "epochs": 1,
        "allocation": args.allocation,
        "offload": args.work if args.offload else None,
    }
    planned = pipeline.plan(folder, **settings)
    peaks = {"RssAnon": 0, "RssFile": 0}
    phases: dict[str, int] = {}
    phase, finished = "open", threading.Event()

    def watch() -> None:
        while not finished.wait(0.01):
            now = status()
            for key in peaks:
                peaks[key] = max(peaks[key], now[key])
            phases[phase] = max(phases.get(phase, 0), now["RssAnon"])

    def on_progress(progress: pipeline.Progress) -> None:
        nonlocal phase
        phase = progress.phase

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    try:
        result = pipeline.quantize(folder, out, restart=True, on_progress=on_progress, **settings)
    finally:
        finished.set()
        watcher.join()
    last = status()
    return {
        "blocks": blocks,
        "source_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "quantized_weights": result["quantized_weights"],
        "bits_per_weight": result["bits_per_weight"],
        "preset": args.preset,
        "allocation": args.allocation,
        "samples": args.samples,
        "seqlen": args.seqlen,
        "address_space_bytes": last["VmPeak"],
        "predicted_bytes": planned["peak_memory_bytes"],
        "anonymous_bytes": peaks["RssAnon"],
        "file_backed_bytes": peaks["RssFile"],
        "resident_bytes": last["VmHWM"],
        "anonymous_by_phase": phases,
        "seconds": time.monotonic() - began,
    }


if __name__ == "__main__":
    main()
