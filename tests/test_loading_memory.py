"""What loading a packed model leaves in memory, and what it takes on the way, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed import OWNERS, write_packed
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ptq161.evaluate.speed import random_layout, random_packed
from ptq161.hf import save_packed
from ptq161.kernels import cpu_kernels
from ptq161.layout import ModelLayout, PackedLinearSpec
from ptq161.machine import recent_peak_rss_bytes, reset_peak_rss

LOAD = """
import json, sys
import torch, ptq161
from ptq161.machine import recent_peak_rss_bytes, reset_peak_rss, resident_bytes

tokens = torch.zeros(1, 4, dtype=torch.long)
def answer(path):
    model = ptq161.load(path, mode="packed")
    peak = recent_peak_rss_bytes()
    with torch.inference_mode():
        model.get_output_embeddings().weight.sum()  # as much of the embedding as there is
        model(tokens)
    return model, peak

answer(sys.argv[1])  # of a tiny model: imports everything
before = reset_peak_rss()
model, peak = answer(sys.argv[2])
print(json.dumps({"peak": peak - before, "resident": resident_bytes() - before}))
"""


def write_large(folder: Path) -> None:
    """A packed Llama with random weights, 144 MB: what a process needs besides is about 16 MB."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=64000,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    specs, packed = {}, {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and ".layers." in name:
            parent, _, leaf = name.rpartition(".")
            layout = random_layout(*linear.weight.shape, "mixed")
            specs[name] = PackedLinearSpec(layout, f"{parent}.{OWNERS[leaf]}" if leaf in OWNERS else None)
            tensors = random_packed(layout, torch.Generator().manual_seed(0)).tensors
            packed |= {f"{name}.{tensor}": tensors[tensor] for tensor in specs[name].specs()}
    save_packed(folder, model, ModelLayout(specs), packed, dtype=None, run={}, tokenizer=None)


@pytest.mark.slow
@pytest.mark.skipif(not cpu_kernels() or sys.platform != "linux", reason="needs the extension, and /proc")
def test_memory_is_little_more_than_the_file(tmp_path):
    write_packed(tmp_path / "tiny")
    write_large(tmp_path / "large")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "tiny"), str(tmp_path / "large")]
    grown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    file = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert grown["resident"] <= 1.2 * file, grown
    assert grown["peak"] <= 2 * file, grown


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_can_be_forgotten():
    torch.ones(30_000_000)
    before = reset_peak_rss()
    assert recent_peak_rss_bytes() < before + 50_000_000
    torch.ones(30_000_000)
    assert recent_peak_rss_bytes() > before + 100_000_000
