"""The sensitivity pass: squares of inputs and gradients against explicit ones, and the harm made of them."""

from functools import partial

import pytest
import torch
from families import FAMILIES, VOCABULARY, build
from torch import nn

from ptq161.allocation import MIXED_WIDTHS
from ptq161.binarize import nearest_level
from ptq161.blocks import float32_vectors
from ptq161.budget import LinearShape
from ptq161.dense import DenseModel
from ptq161.discovery import decoder_blocks, first_hidden, linear_shapes, trace, without_blocks
from ptq161.draws import tokens_at
from ptq161.errors import NonFiniteError
from ptq161.mixed import best_scale
from ptq161.sensitivity import Squares, column_harm, measure_squares, shared_harms
from ptq161.space import MEMORY, Space

CPU = torch.device("cpu")
SAMPLES = torch.randint(4, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


class Case:
    """A tiny model, and the arguments of the pass for it."""

    def __init__(self, family="llama", dtype=torch.float32):
        self.model = build(FAMILIES[family]()).to(dtype).requires_grad_(False)
        self.dense = DenseModel.of(self.model)
        prefix, blocks = decoder_blocks(self.model)
        with without_blocks(blocks):
            self.model.float()  # after the copy: as the pipeline has the model around the blocks
        traced = trace(self.model, blocks, SAMPLES)
        self.calls, self.shapes = traced.calls, linear_shapes(self.model, prefix, blocks, traced)
        self.linears = {name: self.model.get_submodule(name) for name in self.shapes}
        self.hidden = first_hidden(self.model, blocks, SAMPLES)

    def squares(self, names=None, samples=SAMPLES, space=MEMORY, dtype=torch.bfloat16):
        """Linear -> Squares, of the streamed pass."""
        found = {}
        arguments = (self.calls, names or self.shapes, self.hidden.clone(), samples, generator(), CPU, dtype, space)
        for _, squares in measure_squares(self.dense, *arguments):
            found |= squares
        return found

    def harms(self, shapes=None, widths=MIXED_WIDTHS, seed=5):
        arguments = (
            self.calls,
            shapes or self.shapes,
            self.hidden.clone(),
            SAMPLES,
            widths,
            generator(seed),
            CPU,
            torch.bfloat16,
        )
        return shared_harms(self.dense, *arguments, Space())


def whole_model_squares(model, linears, products):
    """The same without streaming: one forward and one backward pass of the whole model per sample."""
    found = {name: Squares(torch.zeros(m.in_features), torch.zeros(m.out_features)) for name, m in linears.items()}

    def add_gradient(squares, gradient):
        squares.gradients += gradient.float().flatten(0, -2).square().sum(dim=0)

    def watch(squares, module, args, output):
        inputs = args[0].detach().float().flatten(0, -2)
        squares.inputs += inputs.square().sum(dim=0)
        squares.tokens += len(inputs)
        output.register_hook(partial(add_gradient, squares))

    handles = [module.register_forward_hook(partial(watch, found[name])) for name, module in linears.items()]
    handles.append(model.get_input_embeddings().register_forward_hook(lambda _, args, out: out.requires_grad_()))
    draws = generator()
    if products == torch.float32:
        model.float()
    with float32_vectors(model), torch.autocast("cpu", torch.bfloat16, enabled=products == torch.bfloat16):
        for sample in SAMPLES:
            logits = model(sample[None], use_cache=False).logits[0].float()
            drawn = tokens_at(torch.rand(len(sample), generator=draws), logits.detach().softmax(-1))
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_gives_the_numbers_of_the_whole_model_at_once(family, dtype, products, tmp_path):
    case = Case(family, dtype)
    found = case.squares(space=Space(tmp_path), dtype=products)
    expected = whole_model_squares(case.model, case.linears, products)
    assert found.keys() == expected.keys()
    for name, squares in expected.items():
        assert found[name].tokens == squares.tokens
        assert found[name].inputs.equal(squares.inputs) and squares.inputs.norm() > 0, name
        assert found[name].gradients.equal(squares.gradients) and squares.gradients.norm() > 0, name


def drawn_labels(model, products):
    """The labels that the pass draws from the model's own predictions."""
    draws, labels = generator(), []
    for sample in SAMPLES:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=products == torch.bfloat16):
            chances = model(sample[None], use_cache=False).logits[0].float().softmax(-1)
        labels.append(tokens_at(torch.rand(len(sample), generator=draws), chances))
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


# bfloat16 rounds to 8 bits, and squares show twice the error.
@pytest.mark.parametrize(("products", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_squares_are_those_of_explicit_gradients_token_by_token(family, products, tolerance):
    case = Case(family)
    squares, labels = case.squares(dtype=products), drawn_labels(case.model, products)
    for name in list(case.linears)[:: max(1, len(case.linears) // 5)]:
        inputs, gradients = explicit_squares(case.model, name, labels)
        assert squares[name].tokens == SAMPLES.numel()
        for found, expected in ((squares[name].inputs, inputs), (squares[name].gradients, gradients)):
            assert (found - expected).norm() < tolerance * expected.norm(), name
            assert expected.norm() > 0


def test_model_in_memory_is_left_as_it_was():
    case = Case()
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    case.squares()
    assert all(tensor.equal(before[name]) for name, tensor in case.model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in case.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())
    assert all(parameter.is_meta for parameter in case.dense.skeleton.parameters())


def test_predictions_that_are_not_finite_are_named():
    case = Case()
    case.hidden[1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="predicts NaN on calibration sample 1"):
        case.squares()


def test_same_draws_same_harms_other_draws_others():
    case = Case()
    one, again, other = case.harms(), case.harms(), case.harms(seed=6)
    assert all(one[name].equal(again[name]) for name in one)
    assert not any(one[name].equal(other[name]) for name in one)


def test_progress_counts_every_block_there_and_back():
    case, seen = Case(), []
    arguments = (
        case.calls,
        case.shapes,
        case.hidden.clone(),
        SAMPLES,
        MIXED_WIDTHS,
        generator(),
        CPU,
        torch.bfloat16,
        Space(),
    )
    shared_harms(case.dense, *arguments, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


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
    case = Case()
    squares, harms = case.squares(), case.harms()
    assert set(harms) == {name for name, shape in case.shapes.items() if shape.columns_from is None}
    members = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    expected = sum(column_harm(case.linears[name].weight, squares[name], MIXED_WIDTHS) for name in members)
    torch.testing.assert_close(harms[members[0]], expected)


def test_fewer_levels_harm_more():
    for harm in Case().harms(widths=MIXED_WIDTHS).values():
        assert harm.isfinite().all() and (harm >= 0).all()
        one, ternary, four = harm.sum(dim=0).tolist()
        assert one > ternary > 5 * four > 0


@pytest.mark.parametrize("index", [0, 1])
def test_only_the_named_linears_are_watched_and_earlier_blocks_not_gone_back_to(index):
    case, seen = Case(), []
    name = f"model.layers.{index}.mlp.down_proj"
    arguments = (
        case.calls,
        {name: LinearShape(32, 48)},
        case.hidden.clone(),
        SAMPLES,
        MIXED_WIDTHS,
        generator(),
        CPU,
        torch.bfloat16,
    )
    harms = shared_harms(case.dense, *arguments, Space(), lambda done, total: seen.append(done))
    assert list(harms) == [name] and harms[name].shape == (48, 3)
    assert harms[name].equal(case.harms()[name])
    assert len(seen) == 4 - index
