"""The sensitivity pass: squares of inputs and gradients against explicit ones, and the harm made of them."""

import pytest
import torch
from families import FAMILIES, VOCABULARY, build
from torch import nn

from ptq161.allocation import MIXED_WIDTHS
from ptq161.binarize import CODE_WIDTHS, nearest_level
from ptq161.blocks import float32_vectors
from ptq161.budget import LinearShape
from ptq161.discovery import decoder_blocks, linear_shapes, trace
from ptq161.mixed import best_scale
from ptq161.sensitivity import Squares, column_harm, measure_squares, shared_harms

CPU = torch.device("cpu")
SAMPLES = torch.randint(4, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


def generator():
    return torch.Generator().manual_seed(5)


def tiny(family="llama"):
    """(frozen model, linears of its blocks by full name, their shapes)"""
    model = build(FAMILIES[family]()).requires_grad_(False)
    prefix, blocks = decoder_blocks(model)
    shapes = linear_shapes(model, prefix, blocks, trace(model, blocks, SAMPLES))
    return model, {name: model.get_submodule(name) for name in shapes}, shapes


def drawn_labels(model):
    """The labels that the pass draws from the model's own bfloat16 predictions."""
    draws, labels = generator(), []
    for sample in SAMPLES:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            chances = model(sample[None], use_cache=False).logits[0].float().softmax(-1)
        labels.append(torch.multinomial(chances, 1, generator=draws)[:, 0])
    return labels


def explicit_squares(model, name, labels):
    """(inputs, gradients) in float32: the gradient at each token's output of one linear, squared and added."""
    linear = model.get_submodule(name)
    inputs, gradients = torch.zeros(linear.in_features), torch.zeros(linear.out_features)
    for sample, label in zip(SAMPLES, labels, strict=True):
        seen = []

        def loss(shift, sample=sample, label=label, seen=seen):
            def add(module, args, output):
                seen.append(args[0].detach())
                return output + shift

            handle = linear.register_forward_hook(add)
            logits = model(sample[None], use_cache=False).logits[0]
            handle.remove()
            return nn.functional.cross_entropy(logits, label, reduction="sum")

        gradient = torch.func.grad(loss)(torch.zeros(1, len(sample), linear.out_features))
        for token in gradient[0]:
            gradients += token.square()
        inputs += seen[0].flatten(0, -2).square().sum(dim=0)
    return inputs, gradients


@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_squares_are_those_of_explicit_gradients_token_by_token(family):
    model, linears, _ = tiny(family)
    squares = measure_squares(model, linears, SAMPLES, generator())
    labels = drawn_labels(model)
    for name in list(linears)[:: max(1, len(linears) // 5)]:
        inputs, gradients = explicit_squares(model, name, labels)
        assert squares[name].tokens == SAMPLES.numel()
        # The pass multiplies in bfloat16, of which squares show twice the error.
        for found, expected in ((squares[name].inputs, inputs), (squares[name].gradients, gradients)):
            assert (found - expected).norm() < 0.1 * expected.norm(), name
            assert expected.norm() > 0


def test_model_is_left_as_it_was():
    model, linears, _ = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_squares(model, linears, SAMPLES, generator())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_go_even_when_the_pass_fails():
    model, linears, _ = tiny()
    with pytest.raises(IndexError):
        measure_squares(model, linears, SAMPLES + VOCABULARY, generator())
    assert not any(module._forward_hooks for module in model.modules())


def test_same_draws_same_harms_other_draws_others():
    model, _, shapes = tiny()
    one, again = (shared_harms(model, shapes, SAMPLES, MIXED_WIDTHS, generator()) for _ in range(2))
    other = shared_harms(model, shapes, SAMPLES, MIXED_WIDTHS, torch.Generator().manual_seed(6))
    assert all(one[name].equal(again[name]) for name in one)
    assert not any(one[name].equal(other[name]) for name in one)


# What is made of them


def test_harm_is_the_formula_by_brute_force():
    """sum_i F_i * H_jj * dW_ij^2 / 2, one weight at a time."""
    draws = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 6, generator=draws)
    squares = Squares(10 * torch.rand(6, generator=draws), 3 * torch.rand(4, generator=draws), tokens=5)
    harm = column_harm(weight, squares, MIXED_WIDTHS)
    assert harm.shape == (6, 3)
    for index, width in enumerate(MIXED_WIDTHS):
        scale = best_scale(weight, width, squares.inputs / 5)
        for j in range(6):
            expected = 0.0
            for i in range(4):
                level = nearest_level(weight[i : i + 1, j : j + 1] / scale[i], width)
                change = (level * scale[i] - weight[i, j]).item()
                expected += squares.gradients[i].item() / 5 * squares.inputs[j].item() / 5 * change**2 / 2
            assert harm[j, index].item() == pytest.approx(expected, rel=1e-4)


def test_linears_with_one_input_add_up_under_the_first():
    model, linears, shapes = tiny()
    squares = measure_squares(model, linears, SAMPLES, generator())
    harms = shared_harms(model, shapes, SAMPLES, MIXED_WIDTHS, generator())
    assert list(harms) == [name for name, shape in shapes.items() if shape.columns_from is None]
    members = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    expected = sum(column_harm(linears[name].weight, squares[name], MIXED_WIDTHS) for name in members)
    torch.testing.assert_close(harms[members[0]], expected)


def test_fewer_levels_harm_more():
    model, _, shapes = tiny()
    for harm in shared_harms(model, shapes, SAMPLES, tuple(CODE_WIDTHS.values()), generator()).values():
        assert harm.isfinite().all() and (harm >= 0).all()
        one, ternary, four = harm.sum(dim=0).tolist()
        assert one > ternary > 5 * four > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_model_in_sixteen_bits_gives_about_the_same(family):
    """The pipeline reads such models as they are; their norms and biases alone become float32 for the pass."""
    model, _, shapes = tiny(family)
    expected = shared_harms(model, shapes, SAMPLES, MIXED_WIDTHS, generator())
    _, blocks = decoder_blocks(model)
    blocks.to(torch.bfloat16)
    with float32_vectors(model):
        found = shared_harms(model, shapes, SAMPLES, MIXED_WIDTHS, generator())
    assert {parameter.dtype for parameter in blocks.parameters()} == {torch.bfloat16}
    totals = [sum(harm.sum().item() for harm in harms.values()) for harms in (found, expected)]
    assert totals[0] == pytest.approx(totals[1], rel=0.6)  # labels drawn anew from slightly other predictions


def test_only_the_named_linears_are_watched():
    model, _, _ = tiny()
    name = "model.layers.0.mlp.down_proj"
    harms = shared_harms(model, {name: LinearShape(32, 48)}, SAMPLES, MIXED_WIDTHS, generator())
    assert list(harms) == [name] and harms[name].shape == (48, 3)
