"""Causal attention with a backward pass of its own: the same as transformers' `eager`, wherever it is used."""

import pytest
import torch
from families import FAMILIES, VOCABULARY, build
from test_attention import Grouped, tensors
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ptq161.causal import CAUSAL, attend_causally, fast_attention

CPU = torch.device("cpu")


def by_the_book(query, key, value, scale):
    shared = query.shape[1] // key.shape[1]
    key, value = (side.repeat_interleave(shared, dim=1) for side in (key, value))
    scores = query @ key.mT * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize("length", [1, 5, 128, 300])
def test_forward_and_backward_by_the_book(length, heads, key_heads, dtype, tolerance):
    query, key, value = tensors(dtype, 2, heads, key_heads, length, length)
    value = torch.cat([value, -value[..., :4]], dim=-1)  # wider than the keys
    upstream = torch.randn((2, length, heads, value.shape[-1]), generator=torch.Generator().manual_seed(1))
    made, wanted = [], []
    for results, inputs in ((made, (query, key, value)), (wanted, (query.float(), key.float(), value.float()))):
        leaves = [side.detach().clone().requires_grad_() for side in inputs]
        if results is made:
            output, weights = attend_causally(Grouped(heads // key_heads), *leaves, None, scaling=0.3)
            assert weights is None and output.is_contiguous()
        else:
            output = by_the_book(*leaves, 0.3)
        output.backward(upstream.to(output.dtype))
        results += [output, *(leaf.grad for leaf in leaves)]
    for got, expected in zip(made, wanted, strict=True):
        assert got.dtype == dtype
        assert (got.float() - expected).norm() <= tolerance * max(expected.norm(), upstream.norm())


def test_gradients_are_those_of_differences():
    leaves = [side.double().requires_grad_() for side in tensors(torch.float32, 1, 2, 1, 4, 4, width=3)]
    torch.set_default_dtype(torch.float64)
    try:
        upstream = torch.randn(1, 4, 2, 3)

        def loss():
            return (attend_causally(Grouped(2), *leaves, None)[0] * upstream).sum()

        loss().backward()
        for leaf in leaves:
            for place in ((0, 0, 1, 2), (0, 0, 3, 0)):
                slope = 0.0
                for sign in (1, -1):
                    with torch.no_grad():
                        leaf[place] += sign * 1e-3
                        slope += sign * loss().item() / 2e-3
                        leaf[place] -= sign * 1e-3
                assert slope == pytest.approx(leaf.grad[place].item(), abs=1e-3)  # probabilities are in float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_under_autocast_products_are_in_bfloat16():
    """As the rotated queries of a float32 model are: in float32, beside values in bfloat16."""
    query, key, value = tensors(torch.float32, 1, 4, 2, 40, 40)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attend_causally(Grouped(2), query, key, value.bfloat16(), None)
    assert output.dtype == torch.bfloat16
    expected, _ = attend_causally(Grouped(2), query.bfloat16(), key.bfloat16(), value.bfloat16(), None)
    assert output.equal(expected)


@pytest.mark.parametrize("case", ["mask", "not causal", "shorter query", "dropout"])
def test_everything_else_is_transformers_own(case):
    queries = 3 if case == "shorter query" else 7
    query, key, value = tensors(torch.float32, 1, 4, 2, queries, 7)
    mask = torch.zeros(1, 1, 7, 7) if case == "mask" else None
    settings = {"is_causal": False if case == "not causal" else None, "dropout": 0.5 if case == "dropout" else 0.0}
    found = []
    for function in (attend_causally, sdpa_attention_forward):
        torch.manual_seed(0)
        found.append(function(Grouped(2), query, key, value, mask, **settings)[0])
    assert found[0].equal(found[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_predicts_what_it_does_with_eager_attention(family):
    model = build(FAMILIES[family]())
    before = model.config._attn_implementation
    tokens = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))

    def learned():
        model.zero_grad()
        logits = model(tokens, use_cache=False).logits
        functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with fast_attention(model, CPU):
        made = learned()
    assert model.config._attn_implementation == before
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    for got, expected in zip(made, learned(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_which_families_have_it():
    """Those that cap their scores have `eager`; those that do not ask which function to use keep theirs."""
    used = set()
    for family, config in FAMILIES.items():
        model = build(config())
        with fast_attention(model, CPU):
            used |= {family} if model.config._attn_implementation == CAUSAL else set()
    assert used == FAMILIES.keys() - {"gemma2", "falcon", "falcon-multi-query", "falcon-alibi"}


def test_on_other_devices_nothing_changes():
    model = build(FAMILIES["llama"]())
    before = model.config._attn_implementation
    with fast_attention(model, torch.device("meta")):
        assert model.config._attn_implementation == before
