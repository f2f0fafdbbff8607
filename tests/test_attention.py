"""Heads that share keys, folded for one query: the same as transformers' own attention, wherever that is used."""

import json

import pytest
import torch
from packed import write_packed
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import ptq161
from ptq161.attention import FOLDED, STANDARD, attend


class Grouped(nn.Module):
    """What transformers asks a module that attends for."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def tensors(dtype, batch, heads, key_heads, queries, positions, width=16):
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (batch, queries, heads, width),
        (batch, positions, key_heads, width),
        (batch, positions, key_heads, width),
    ]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "key_heads"), [(8, 2), (9, 3), (6, 1), (4, 4)])
@pytest.mark.parametrize(("queries", "positions"), [(1, 1), (1, 37), (5, 5)])
def test_attends_as_transformers_does(queries, positions, heads, key_heads, masked, dtype):
    query, key, value = tensors(dtype, 2, heads, key_heads, queries, positions)
    mask = None
    if masked:
        mask = torch.ones(2, 1, queries, positions, dtype=torch.bool)
        mask[1, ..., : positions // 2] = False
    module = Grouped(heads // key_heads)
    ours, nothing = attend(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert nothing is None and ours.shape == theirs.shape == (2, queries, heads, 16)
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3", "gemma3", "falcon", "opt"])
def folder(request, tmp_path_factory, tokenizer):
    """A packed model. Do not write into it."""
    folder = tmp_path_factory.mktemp("packed") / request.param
    write_packed(folder, family=request.param, tokenizer=tokenizer)
    return folder


def test_a_model_decodes_as_without(folder):
    """Two prompts of different length, padded, beyond the sliding windows."""
    model = ptq161.load(folder, mode="packed", activations="float32")
    tokens = torch.randint(4, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0

    def write():
        settings = {"max_new_tokens": 12, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        return model.generate(tokens, attention_mask=mask, **settings)

    ours = write()
    model.set_attn_implementation(STANDARD)
    theirs = write()
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_only_models_that_would_use_sdpa_get_it(tmp_path, tokenizer):
    folder = tmp_path / "model"
    write_packed(folder, tokenizer=tokenizer)
    assert ptq161.load(folder, mode="packed").config._attn_implementation == FOLDED
    assert ptq161.load(folder, mode="dense").config._attn_implementation == STANDARD
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    ptq161.load(folder, mode="packed").save_pretrained(tmp_path / "again")
    assert FOLDED not in json.dumps(json.loads((tmp_path / "again" / "config.json").read_text()))
