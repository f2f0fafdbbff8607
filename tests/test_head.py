"""A head that is not packed: the native product of a dense weight, and the module in its place."""

import copy

import pytest
import torch
from families import FAMILIES, build
from hypothesis import given
from hypothesis import strategies as st
from packed import write_packed
from torch import nn
from transformers import AutoModelForCausalLM

import ptq161
from ptq161.head import DenseHead
from ptq161.kernels import cpu_kernels, dense_linear, has_dense_kernel
from ptq161.kernels.dense import TOKENS
from ptq161.kernels.native import array, native

needs_native = pytest.mark.skipif(not cpu_kernels(), reason="the native extension is not built")
INPUT = torch.arange(3, 15)[None]
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def example(tokens, rows, cols, dtype, start=0):
    """Activations and a weight that begins `start` elements behind the start of its memory."""
    generator = torch.Generator().manual_seed(rows * cols + tokens)
    memory = torch.randn(rows * cols + start, generator=generator).to(dtype)
    return torch.randn(tokens, cols, generator=generator).to(dtype), memory[start:].view(rows, cols)


def error(y, x, weight):
    expected = x.double() @ weight.double().T
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))


# The product


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", cpu_kernels())
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 64), (31, 7), (33, 16), (96, 31), (65, 577), (200, 2048)])
def test_every_kernel_agrees_with_float64(rows, cols, kernel, dtype):
    for tokens in range(1, TOKENS + 1):
        for start in (0, 1, 5):
            x, weight = example(tokens, rows, cols, dtype, start)
            assert error(dense_linear(x, weight, kernel=kernel), x, weight) <= DTYPES[dtype]


@needs_native
@pytest.mark.parametrize("tokens", [5, 8, 11])
def test_the_native_product_takes_more_tokens_than_it_is_used_for(tokens):
    x, weight = example(tokens, 40, 70, torch.float32)
    for kernel in cpu_kernels():
        assert error(dense_linear(x, weight, kernel=kernel), x, weight) <= 1e-6


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype):
    x, weight = example(2, 700, 512, dtype)
    alone = dense_linear(x, weight)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(dense_linear(x, weight), alone)
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row_and_token(dtype):
    x, weight = example(3, 40, 70, dtype)
    weight[7, 3], weight[9, 69] = float("inf"), float("nan")
    x[1, 5] = float("nan")
    y = dense_linear(x, weight)
    expected = torch.zeros(3, 40, dtype=torch.bool)
    expected[:, [7, 9]] = expected[1] = True
    assert torch.equal(~y.isfinite(), expected)


@needs_native
def test_any_batch_shape_and_strided_activations():
    x, weight = example(4, 40, 70, torch.float32)
    y = dense_linear(x, weight)
    assert torch.equal(dense_linear(x.view(2, 1, 2, 70), weight), y.view(2, 1, 2, 40))
    assert torch.equal(dense_linear(x[0], weight), dense_linear(x[:1], weight)[0])
    assert torch.equal(dense_linear(x.T.contiguous().T, weight), y)
    assert dense_linear(x[:0], weight).shape == (0, 40)


@needs_native
def test_what_is_left_to_torch():
    x, weight = example(2, 40, 70, torch.float32)
    assert has_dense_kernel(x, weight)
    assert not has_dense_kernel(torch.randn(TOKENS + 1, 70), weight)
    assert not has_dense_kernel(x.bfloat16(), weight)
    assert not has_dense_kernel(x.half(), weight.half())
    assert not has_dense_kernel(x[:, :69], weight)
    assert not has_dense_kernel(x.to("meta"), weight.to("meta"))
    assert not has_dense_kernel(x[:, :40], weight.T[:40])
    assert not has_dense_kernel(x.requires_grad_(), weight)
    with torch.no_grad():
        assert has_dense_kernel(x, weight)

    def seen_by_vmap(row):
        assert not has_dense_kernel(row, weight)
        return row.sum()

    torch.vmap(seen_by_vmap)(x.detach())


@needs_native
@given(data=st.data())
def test_native_sizes_are_checked_again(data):
    """Addresses of real arrays with any sizes: an error, or the sizes were right."""
    assert native is not None
    x, weight = example(2, 6, 11, torch.float32)
    y = torch.zeros(2, 6)
    right = ["scalar", 2, 6, 11, 0, array(x), array(y), array(weight), 1]
    native.dense(*right)
    place = data.draw(st.integers(0, len(right) - 1))
    old = right[place]
    if isinstance(old, tuple):
        count = data.draw(st.integers(-(2**63), 2**63 - 1).filter(lambda n: n != old[1]))
        wrong = (data.draw(st.sampled_from([old[0], 0, old[0] + 1])), count)
    elif isinstance(old, str):
        wrong = data.draw(st.sampled_from(["", "sse9", "SCALAR"]))
    else:
        numbers = st.one_of(st.integers(-(2**70), -1), st.integers(2**33, 2**70), st.sampled_from([0, 1, 2, 3]))
        wrong = data.draw(st.one_of(numbers.filter(lambda n: n != old), st.text(), st.none()))
        if place in (4, 8) and wrong in (0, 1, 2, 3):  # another type of the same arrays, more threads
            return
    with pytest.raises((ValueError, TypeError)):
        native.dense(*right[:place], wrong, *right[place + 1 :])


@needs_native
def test_misaligned_arrays_are_refused():
    assert native is not None
    x, weight = example(1, 6, 11, torch.float32)
    y = torch.zeros(1, 6)
    with pytest.raises(ValueError, match="aligned"):
        native.dense("scalar", 1, 6, 11, 0, array(x), array(y), (weight.data_ptr() + 2, weight.numel()), 1)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        native.dense("scalar", 1, 6, 11, 2, array(x), array(y), array(weight), 1)


# The module


@pytest.fixture(scope="module", params=["llama", "llama-tied", "gemma3"])
def folder(request, tmp_path_factory, tokenizer):
    """A packed model whose head is dense. Do not write into it."""
    folder = tmp_path_factory.mktemp("packed") / request.param
    write_packed(folder, family=request.param, tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_has_a_faster_head_with_the_same_weight(folder, dtype):
    model = ptq161.load(folder, mode="packed", dtype=dtype)
    head = model.get_output_embeddings()
    assert type(head) is DenseHead
    tied = model.config.tie_word_embeddings
    assert (head.weight is model.get_input_embeddings().weight) == tied
    hidden = torch.randn(1, 1, head.in_features).to(dtype)
    with torch.no_grad():
        assert error(head(hidden)[0], hidden[0], head.weight) <= DTYPES[dtype]
        torch.testing.assert_close(head(hidden), nn.functional.linear(hidden, head.weight), rtol=1e-2, atol=1e-4)


def test_unpacked_it_is_an_ordinary_linear(folder):
    model = ptq161.load(folder, mode="dense")
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear
    assert (head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings


def test_it_saves_copies_and_casts_as_a_linear_does(folder, tmp_path):
    model = ptq161.load(folder, mode="packed")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again.get_output_embeddings()) is DenseHead
    copied = copy.deepcopy(model).to(torch.bfloat16)
    assert type(copied.get_output_embeddings()) is DenseHead
    assert copied.get_output_embeddings().weight.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(INPUT).logits
        assert torch.equal(again(INPUT).logits, logits)
        assert (copied(INPUT).logits - logits).norm() <= 0.1 * logits.norm()


def test_it_learns_as_a_linear_does():
    linear = nn.Linear(9, 20, bias=False)
    head, x = DenseHead.of(linear), torch.randn(2, 9)
    head(x).square().sum().backward()
    found, linear.weight.grad = linear.weight.grad, None
    linear(x).square().sum().backward()
    assert torch.equal(found, linear.weight.grad)
    assert head.plain().weight is linear.weight


def test_a_head_with_a_bias_is_left_alone(tmp_path, tokenizer):
    model = build(FAMILIES["llama"]())
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    ptq161.vocabulary.install_packed(model, {})
    assert type(model.lm_head) is nn.Linear
