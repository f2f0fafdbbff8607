"""Linears that see the same input, multiplied together: the same outputs as alone, whatever a caller does."""

import copy

import pytest
import torch
from packed import write_packed

import ptq161
from ptq161.kernels import cpu_kernels
from ptq161.kernels.shared import TOKENS
from ptq161.linear import PackedLinear

pytestmark = pytest.mark.skipif(not cpu_kernels(), reason="the native extension is not built")
INPUT = torch.arange(3, 9)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model in the mixed format, whose rows are no multiples of a tile's. Do not write into it."""
    folder = tmp_path_factory.mktemp("packed") / "llama"
    write_packed(folder, tokenizer=tokenizer, mixed=True)
    return folder


@pytest.fixture
def model(folder):
    return ptq161.load(folder, mode="packed")


def packed(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def alone(linear, x):
    return linear._ready_weight().linear(x, linear.bias, exact=linear.exact)


def attention(model):
    block = model.model.layers[0].self_attn
    return block.q_proj, block.k_proj, block.v_proj


def in_vain(linear):
    return linear._shared[0]._in_vain


def test_what_sees_the_same_input_shares_a_product(model):
    shared = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, PackedLinear) and m._shared}
    assert shared == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    q, k, v = attention(model)
    assert q._shared[0] is k._shared[0] is v._shared[0]
    assert len({linear.get_buffer("tiles").untyped_storage().data_ptr() for linear in (q, k, v)}) == 1


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_a_model_computes_the_same(folder, activations):
    model = ptq161.load(folder, mode="packed", activations=activations)
    settings = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    together = model.generate(INPUT, **settings)
    assert not any(in_vain(linear) for linear in packed(model) if linear._shared)
    for linear in packed(model):
        linear._shared = None
    apart = model.generate(INPUT, **settings)
    assert torch.equal(together.sequences, apart.sequences)
    for one, other in zip(
        together.scores, apart.scores, strict=True
    ):  # parts have strides, which torch may sum otherwise
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, TOKENS, TOKENS + 1])
def test_parts_are_those_of_each_linear(model, tokens):
    x = torch.randn(1, tokens, 32)
    for order in (0, 1, 2), (2, 0, 1):
        linears = [attention(model)[index] for index in order]
        assert all(torch.equal(linear(x), alone(linear, x)) for linear in linears)
    assert not in_vain(attention(model)[0])


@torch.no_grad()
def test_an_input_written_to_in_between_is_another_input(model):
    q, k, v = attention(model)
    x = torch.randn(1, 1, 32)
    q(x)
    x.mul_(2)
    assert torch.equal(k(x), alone(k, x)) and torch.equal(v(x), alone(v, x))


@torch.no_grad()
def test_a_product_that_is_not_used_is_the_last(model):
    q, k, v = attention(model)
    for _ in range(3):
        x = torch.randn(1, 1, 32)
        assert torch.equal(q(x), alone(q, x))
        assert torch.equal(k(x.clone()), alone(k, x))
    assert in_vain(q) and in_vain(v)


@torch.no_grad()
def test_nothing_is_kept_for_longer_than_needed(model):
    q, k, v = attention(model)
    x = torch.randn(1, 1, 32)
    for linear in (q, k, v):
        linear(x)
    assert q._shared[0]._kept is None


def test_gradients_and_inference_tensors_go_alone(model):
    q, k, _ = attention(model)
    x = torch.randn(1, 1, 32, requires_grad=True)
    q(x).sum().backward()
    assert x.grad is not None and q._shared[0]._kept is None
    with torch.inference_mode():
        x = torch.randn(1, 1, 32)
        assert torch.equal(q(x), alone(q, x)) and torch.equal(k(x), alone(k, x))
        assert q._shared[0]._kept is None


@torch.no_grad()
def test_another_precision_in_between_is_another_product(model):
    q, k, _ = attention(model)
    k.exact = True
    x = torch.randn(1, 1, 32)
    assert torch.equal(q(x), alone(q, x)) and torch.equal(k(x), alone(k, x))


def test_copies_casts_and_states_are_as_before(model):
    logits, state = model(INPUT).logits, model.state_dict()
    copied = copy.deepcopy(model)
    assert all(linear._shared is None for linear in packed(copied))
    cast = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)
    for other in (copied, cast):
        assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items() if "proj" in name)
    assert torch.equal(copied(INPUT).logits, logits)
    model.load_state_dict(state)
    for linear in packed(model):
        linear.tile()
    assert torch.equal(model(INPUT).logits, logits)


@pytest.mark.parametrize(("family", "mixed"), [("llama", False), ("llama-tied", True)])
def test_column_scales_and_biases_keep_linears_apart(tmp_path, tokenizer, family, mixed):
    write_packed(tmp_path / "model", family, tokenizer=tokenizer, mixed=mixed)
    model = ptq161.load(tmp_path / "model", mode="packed")
    assert all(linear._shared is None for linear in attention(model))
