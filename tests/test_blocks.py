"""Blocks are found, called, replayed and watched alike in every family, with no family named in the package."""

import pytest
import torch
from families import FAMILIES, REFUSED, VOCABULARY, build
from torch import nn

from ptq161.blocks import InputStats, advance, check_stats, check_weights, float32_vectors, watch_inputs
from ptq161.discovery import (
    block_linears,
    config_shapes,
    decoder_blocks,
    first_hidden,
    linear_shapes,
    trace,
    without_blocks,
)
from ptq161.errors import NonFiniteError, UnsupportedModel, UnsupportedModule

CPU = torch.device("cpu")
SAMPLES = torch.randint(4, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def model_hidden(model, samples):
    """What the model's own forward pass hands from its last block to the final norm."""
    _, blocks = decoder_blocks(model)
    seen = []
    handle = blocks[-1].register_forward_hook(
        lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(samples, use_cache=False)
    handle.remove()
    return seen[0]


def replay(model, samples):
    """The same by way of blocks.py: one sample and one block at a time."""
    _, blocks = decoder_blocks(model)
    calls = trace(model, blocks, samples).calls
    hidden = first_hidden(model, blocks, samples)
    for block, call in zip(blocks, calls, strict=True):
        hidden = advance(block, call, hidden, CPU)
    return hidden


@EVERY_FAMILY
def test_replayed_blocks_give_the_models_own_hidden_states(family):
    model = build(FAMILIES[family]())
    torch.testing.assert_close(replay(model, SAMPLES), model_hidden(model, SAMPLES), rtol=1e-5, atol=1e-5)


@EVERY_FAMILY
def test_bfloat16_model_is_traced_in_float32_and_left_as_it_was(family):
    model = build(FAMILIES[family]()).to(torch.bfloat16)
    _, blocks = decoder_blocks(model)
    with without_blocks(blocks):
        model.float()
    before = {name: tensor.clone() for name, tensor in blocks.state_dict().items()}
    calls = trace(model, blocks, SAMPLES).calls
    assert all(
        tensor.equal(before[name]) and tensor.dtype == before[name].dtype
        for name, tensor in blocks.state_dict().items()
    )

    hidden = first_hidden(model, blocks, SAMPLES)
    assert hidden.dtype == torch.float32
    model.float()
    for block, call in zip(blocks, calls, strict=True):
        hidden = advance(block, call, hidden, CPU)
    torch.testing.assert_close(hidden, model_hidden(model, SAMPLES), rtol=1e-5, atol=1e-5)


@EVERY_FAMILY
def test_a_bare_configuration_shows_the_same_shapes_as_the_model(family):
    model = build(FAMILIES[family]())
    prefix, blocks = decoder_blocks(model)
    assert config_shapes(FAMILIES[family]()) == linear_shapes(model, prefix, blocks, trace(model, blocks, SAMPLES))


SHARED_INPUTS = {
    "llama": {"self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj",
              "mlp.up_proj": "mlp.gate_proj"},
    "opt": {"self_attn.v_proj": "self_attn.k_proj", "self_attn.q_proj": "self_attn.k_proj"},
    "phi3": {},
    "gpt-neox": {},
    "falcon": {},
    "falcon-multi-query": {"mlp.dense_h_to_4h": "self_attention.query_key_value"},
}  # fmt: skip


@pytest.mark.parametrize("family", SHARED_INPUTS)
def test_linears_with_the_same_input_are_found(family):
    model = build(FAMILIES[family]())
    _, blocks = decoder_blocks(model)
    assert trace(model, blocks, SAMPLES).columns_from == [SHARED_INPUTS[family]] * len(blocks)


def test_linear_shapes_name_every_linear_and_its_owner_in_full():
    model = build(FAMILIES["llama"]())
    prefix, blocks = decoder_blocks(model)
    shapes = linear_shapes(model, prefix, blocks, trace(model, blocks, SAMPLES))
    expected = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert set(shapes) == expected
    up = shapes["model.layers.1.mlp.up_proj"]
    assert (up.rows, up.cols, up.columns_from) == (48, 32, "model.layers.1.mlp.gate_proj")
    assert shapes["model.layers.1.mlp.gate_proj"].columns_from is None


@pytest.mark.parametrize(
    ("family", "named"), [("gpt2", ("attn.c_attn", "Conv1D")), ("mixtral", ("mlp.experts.gate_up_proj", "Experts"))]
)
def test_weights_outside_linears_are_refused_by_name(family, named):
    model = build(REFUSED[family]())
    _, blocks = decoder_blocks(model)
    with pytest.raises(UnsupportedModule, match=r"nn\.Linear") as error:
        block_linears(model, 1, blocks[1])
    assert all(part in str(error.value) for part in (type(model).__name__, "block 1", *named))
    assert "\n" not in str(error.value)


def test_block_without_linears_is_refused():
    model = build(FAMILIES["llama"]())
    with pytest.raises(UnsupportedModule, match=r"block 0 of LlamaForCausalLM has no nn\.Linear"):
        block_linears(model, 0, nn.LayerNorm(4))


def test_model_without_a_list_of_decoder_blocks_is_refused():
    model = build(FAMILIES["llama"]())
    model._no_split_modules = ["SomethingElse"]
    with pytest.raises(UnsupportedModel, match=r"0 lists of decoder blocks \(none\).*SomethingElse"):
        decoder_blocks(model)


def test_model_that_skips_a_block_is_refused():
    model = build(FAMILIES["llama"]())
    _, blocks = decoder_blocks(model)
    model.model.config.num_hidden_layers = 1
    with pytest.raises(UnsupportedModel, match="1 of its 2 decoder blocks"):
        trace(model, blocks, SAMPLES)


def test_model_with_two_lists_of_decoder_blocks_is_refused():
    model = build(FAMILIES["llama"]())
    model.draft = nn.ModuleList([model.model.layers[0]])
    with pytest.raises(UnsupportedModel, match="2 lists of decoder blocks"):
        decoder_blocks(model)


def test_block_inputs_that_depend_on_the_tokens_are_refused():
    model = build(FAMILIES["llama"]())
    _, blocks = decoder_blocks(model)

    def per_token_argument(block, args, kwargs):
        return args, kwargs | {"per_token": args[0].sum(-1)}

    blocks[1].register_forward_pre_hook(per_token_argument, with_kwargs=True, prepend=True)
    with pytest.raises(UnsupportedModel, match="block 1 of LlamaForCausalLM receives inputs that depend on the tokens"):
        trace(model, blocks, SAMPLES)


def test_call_with_replaced_weights_leaves_the_block_alone():
    model = build(FAMILIES["llama"]())
    _, blocks = decoder_blocks(model)
    call = trace(model, blocks, SAMPLES).calls[0]
    hidden = first_hidden(model, blocks, SAMPLES)[:1]
    before = blocks[0].mlp.down_proj.weight.clone()
    plain = call(blocks[0], hidden)
    doubled = call(blocks[0], hidden, {"mlp.down_proj.weight": 2 * before})
    assert blocks[0].mlp.down_proj.weight.equal(before)
    with torch.no_grad():
        blocks[0].mlp.down_proj.weight *= 2
    torch.testing.assert_close(doubled, call(blocks[0], hidden))
    assert not torch.allclose(doubled, plain)


def test_without_blocks_hides_the_blocks_and_puts_them_back():
    model = build(FAMILIES["llama"]()).to(torch.bfloat16)
    _, blocks = decoder_blocks(model)
    held = list(blocks)
    with pytest.raises(RuntimeError), without_blocks(blocks):
        model.float()
        raise RuntimeError
    assert list(blocks) == held
    assert {p.dtype for p in blocks.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.dtype == torch.float32


def test_watched_inputs_are_the_ones_the_linears_saw():
    model = build(FAMILIES["llama"]())
    _, blocks = decoder_blocks(model)
    linears = block_linears(model, 0, blocks[0])
    call = trace(model, blocks, SAMPLES).calls[0]
    hidden = first_hidden(model, blocks, SAMPLES)
    with watch_inputs(linears) as stats:
        advance(blocks[0], call, hidden, CPU)
    seen = blocks[0].input_layernorm(hidden).detach().flatten(0, 1)
    query = stats["self_attn.q_proj"]
    assert query.tokens == SAMPLES.numel()
    torch.testing.assert_close(query.absmax, seen.abs().amax(0))
    torch.testing.assert_close(query.abs_sum, seen.abs().sum(0))
    assert {name: stat.tokens for name, stat in stats.items()} == dict.fromkeys(linears, SAMPLES.numel())
    advance(blocks[0], call, hidden, CPU)
    assert query.tokens == SAMPLES.numel(), "a hook was left behind"


def test_statistics_by_hand():
    stats = InputStats.empty(3, CPU)
    stats.update(torch.tensor([[1.0, -2.0, 0.0], [3.0, 1.0, 0.0]]))
    stats.update(torch.tensor([[[-4.0, 0.5, 0.0]]]))
    assert stats.tokens == 3
    assert stats.absmax.tolist() == [4.0, 2.0, 0.0]
    assert stats.abs_sum.tolist() == [8.0, 3.5, 0.0]
    assert stats.square_sum.tolist() == [26.0, 5.25, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    linears = {"fine": nn.Linear(2, 2), "broken": nn.Linear(2, 2)}
    check_weights("block.0", linears)
    with torch.no_grad():
        linears["broken"].weight[1, 0] = bad
    with pytest.raises(NonFiniteError, match=r"block\.0\.broken\.weight has NaN or infinite"):
        check_weights("block.0", linears)


def test_inputs_that_are_not_finite_or_missing_are_named():
    stats = InputStats.empty(2, CPU)
    with pytest.raises(UnsupportedModel, match=r"no calibration token reached block\.0\.linear"):
        check_stats("block.0", {"linear": stats})
    stats.update(torch.ones(1, 2))
    check_stats("block.0", {"linear": stats})
    stats.update(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(NonFiniteError, match=r"input of block\.0\.linear is not finite"):
        check_stats("block.0", {"linear": stats})


def test_vectors_are_float32_copies_inside_and_the_originals_afterwards():
    model = build(FAMILIES["opt"]()).to(torch.bfloat16).requires_grad_(False)
    before = {name: (tensor, tensor.clone()) for name, tensor in model.named_parameters()}
    with pytest.raises(KeyError), float32_vectors(model):
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if parameter.ndim == 1 else torch.bfloat16)
            assert parameter.equal(before[name][1].to(parameter.dtype))
            if parameter.ndim == 1:
                parameter.add_(1)
        raise KeyError
    for name, parameter in model.named_parameters():
        original, value = before[name]
        assert parameter is original and parameter.dtype == torch.bfloat16 and parameter.equal(value)
