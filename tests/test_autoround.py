"""AutoRound as a contender: its weights, its bits, what it must leave as it was."""

import copy

import pytest
import torch
from honest_bits import block_bits
from transformers import LlamaConfig, LlamaForCausalLM

from ptq161.autoround import AutoRoundSettings, quantize_with_autoround
from ptq161.discovery import block_linears, decoder_blocks
from ptq161.errors import InputError

pytest.importorskip("auto_round")
CPU = torch.device("cpu")
SHAPES = {0: [(64, 64)] * 3, 1: [(64, 64)], 2: [(160, 64)] * 2, 3: [(64, 160)]}


def model_with(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes | changes)).eval()


def test_its_weights_have_as_many_values_as_its_bits_say():
    original = model_with()
    samples = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    made = quantize_with_autoround(copy.deepcopy(original), samples, AutoRoundSettings(iters=2), seed=0, device=CPU)
    assert sum(made.parts.values()) == 2 * block_bits("autoround", SHAPES)
    assert made.weights == 2 * sum(rows * cols for shared in SHAPES.values() for rows, cols in shared)
    _, blocks = decoder_blocks(made.model)
    _, originals = decoder_blocks(original)
    for block, before in zip(blocks, originals, strict=True):
        for name, linear in block_linears(made.model, 0, block).items():
            assert all(len(row.unique()) <= 4 for part in linear.weight.split(128, dim=1) for row in part)
            wanted = before.get_submodule(name).weight
            assert 0 < (linear.weight.float() - wanted).square().mean() < 0.5 * wanted.square().mean()
    for name, tensor in made.model.state_dict().items():
        if "proj" not in name:
            assert tensor.equal(original.state_dict()[name].to(tensor.dtype)), name
    assert torch.random.get_rng_state().equal(state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_linear_that_it_leaves_out_is_named():
    samples = torch.zeros(2, 16, dtype=torch.long)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate_proj, which is 72x64"):
        quantize_with_autoround(
            model_with(intermediate_size=72), samples, AutoRoundSettings(iters=1), seed=0, device=CPU
        )
