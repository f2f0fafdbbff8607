"""Write a packed LLaMA with random weights, in the mixed format: enough to measure speed, memory and loading.

    python benchmarks/random_llama.py OUT                      Llama-3.2-1B's shape, about 720 MB
    python benchmarks/random_llama.py OUT --head int8          embedding and head at 8 bits
    python benchmarks/random_llama.py OUT --dense DENSE_OUT    and its dense weights in bfloat16, about 2.5 GB

Packed tensors are made from random codes, block by block, and written by the package's own saving path: no weight is
quantized and none is dense. The dense folder holds the same weights unpacked, with the same embedding and head, for
programs that cannot read packed ones; `ptq161 bench OUT` unpacks them itself.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import ptq161
from ptq161.evaluate.speed import random_layout, random_packed
from ptq161.layout import ModelLayout, PackedLinearSpec
from ptq161.saving import save_packed
from ptq161.vocabulary import pack_vocabulary, vocabulary_specs

# Of meta-llama/Llama-3.2-1B, whose head is tied to the embedding.
SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
OWNERS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # linears that see the same input


def main() -> None:
    """Make the folders and say what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dense", type=Path, help="folder for the dense counterpart")
    parser.add_argument("--head", choices=("keep", "int8"), default="keep")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    config = LlamaConfig(
        **{name: getattr(args, name) for name in SHAPE}, tie_word_embeddings=True, max_position_embeddings=131072
    )
    write_packed(config, args.out, int8_head=args.head == "int8")
    print(f"{args.out}: {ptq161.inspect(args.out)['bits_per_weight']:.4f} bits per weight")
    if args.dense is not None:
        model = ptq161.load(args.out, mode="dense")
        del model.config.quantization_config
        model.save_pretrained(args.dense)


def write_packed(config: LlamaConfig, out: Path, *, int8_head: bool) -> None:
    """Save a random packed model of this shape; what is not packed is bfloat16."""
    generator = torch.Generator().manual_seed(0)
    model = _without_linears(config, generator)
    specs, packed = {}, {}
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or ".layers." not in name:
            continue
        parent, _, leaf = name.rpartition(".")
        layout = random_layout(linear.out_features, linear.in_features, "mixed")
        specs[name] = PackedLinearSpec(layout, f"{parent}.{OWNERS[leaf]}" if leaf in OWNERS else None)
        tensors = random_packed(layout, generator).tensors
        packed |= {f"{name}.{tensor}": tensors[tensor] for tensor in specs[name].specs()}
    vocabulary = vocabulary_specs(model) if int8_head else {}
    packed |= pack_vocabulary(model.state_dict(), vocabulary)
    run = {"model": "random weights"}
    layout = ModelLayout(specs, vocabulary)
    save_packed(out, model, layout, packed, dtype=torch.bfloat16, run=run, tokenizer=None)


def _without_linears(config: LlamaConfig, generator: torch.Generator) -> PreTrainedModel:
    """The model on meta, but for embedding and norms, which are random and ones."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            weight = torch.empty(module.weight.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            module.weight = nn.Parameter(weight)
        elif type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=torch.bfloat16))
    model.tie_weights()
    return model


if __name__ == "__main__":
    main()
