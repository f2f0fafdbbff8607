"""llama.cpp as a contender: the exported model is the same function, and what is measured is what its file holds."""

import copy
from importlib.util import find_spec

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ptq161 import gguf_export, llamacpp
from ptq161.discovery import block_linears, decoder_blocks
from ptq161.errors import InputError, UnsupportedModel
from ptq161.gguf_export import Widths, padded, read_linears, unpadded, write_gguf

VOCABULARY = 101


def make_model(**changes):
    """Two blocks, no width a multiple of 256; a large epsilon, so that a wrong one would show."""
    torch.manual_seed(0)
    settings = {
        **{"hidden_size": 200, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 64},
        **{"rms_norm_eps": 1e-2, "initializer_range": 0.1, "tie_word_embeddings": True},
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def samples():
    return torch.randint(0, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))


def exported(model, folder):
    widths = Widths.of(model)
    write_gguf(model, folder / "model.gguf", widths, widths.padded, {})
    return widths


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 2}])
def test_the_padded_file_is_the_same_function(tmp_path, samples, changes):
    """transformers, which reads the file by itself, gets the same logits: heads' order, norms, epsilon, padding."""
    model = make_model(**changes)
    widths = exported(model, tmp_path)
    assert (widths.padded.hidden, widths.padded.inner, widths.padded.heads * widths.padded.head) == (256, 256, 256)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert read.config.hidden_size == 256 and read.config.num_attention_heads == 4
    torch.testing.assert_close(read(samples).logits, model(samples).logits, rtol=0, atol=1e-4)


def test_weights_come_back_exactly(model, tmp_path):
    widths = exported(model, tmp_path)
    found = read_linears(tmp_path / "model.gguf", model, widths, widths.padded)
    assert len(found) == 2 * 7
    weights = model.state_dict()
    assert all(values.equal(weights[name]) for name, values in found.items())


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (Widths(576, 1536, 9, 3, 64), Widths(768, 1536, 12, 4, 64)),  # SmolLM2-135M
        (Widths(4096, 11008, 32, 32, 128), Widths(4096, 11008, 32, 32, 128)),  # LLaMA-7B: nothing to pad
        (Widths(64, 172, 8, 4, 8), Widths(256, 256, 32, 16, 8)),
    ],
)
def test_padded_widths(given, wanted):
    assert given.padded == wanted


def test_rotated_rows_are_neighbours():
    """llama.cpp rotates rows 2i and 2i+1 of a head, transformers rows i and i + half."""
    widths = Widths(hidden=1, inner=1, heads=2, kv_heads=2, head=4)
    rows = torch.arange(8.0)[:, None]
    found = padded("a.q_proj.weight", rows, widths, widths)
    assert found.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert unpadded("a.q_proj.weight", found, widths, widths).equal(rows)
    assert padded("a.v_proj.weight", rows, widths, widths).equal(rows)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"attention_bias": True}, "without biases"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "plain rotary positions"),
        ({"hidden_act": "gelu"}, "with silu only"),
    ],
)
def test_other_models_are_refused(config, says):
    with pytest.raises(UnsupportedModel, match=says):
        Widths.of(make_model(**config))


def test_other_families_are_refused(model_folder):
    with pytest.raises(UnsupportedModel, match="this is a OPTForCausalLM"):
        Widths.of(AutoModelForCausalLM.from_pretrained(model_folder("opt")))


@pytest.mark.parametrize(
    ("name", "part", "block", "group", "wanted"),
    [
        ("IQ1_S", "q_proj", 0, 3, "IQ1_S"),
        ("IQ1_S", "v_proj", 9, 3, "Q2_K"),
        ("IQ1_S", "v_proj", 9, 4, "Q4_K"),
        ("IQ1_S", "down_proj", 2, 3, "Q2_K"),  # the first eighth of 30 blocks are three
        ("IQ1_S", "down_proj", 3, 3, "IQ1_S"),
        ("IQ1_S", "o_proj", 9, 3, "IQ2_XXS"),
        ("IQ2_XXS", "o_proj", 9, 3, "IQ2_XXS"),
        ("IQ2_M", "gate_proj", 9, 3, "IQ2_S"),
        ("IQ2_M", "v_proj", 9, 3, "IQ3_S"),
        ("Q2_K", "down_proj", 29, 1, "Q3_K"),
    ],
)
def test_types_are_llamacpps(name, part, block, group, wanted):
    assert llamacpp.file_type(name).type_of(part, block, 30, group).name == wanted


def test_an_unknown_type():
    with pytest.raises(InputError, match=r"unknown llama\.cpp type 'IQ1'"):
        llamacpp.file_type("IQ1")


def linears_of(model):
    return {
        f"{index}.{name}": linear
        for index, block in enumerate(decoder_blocks(model)[1])
        for name, linear in block_linears(model, index, block).items()
    }


@torch.no_grad()
def test_importance_is_the_mean_square_of_the_inputs(model, samples):
    found = llamacpp.importance(model, linears_of(model), samples)
    embedded = model.model.layers[0].input_layernorm(model.model.embed_tokens(samples))
    wanted = embedded.flatten(0, 1).square().mean(dim=0)
    torch.testing.assert_close(found["0.self_attn.q_proj"], wanted)
    assert found.keys() == linears_of(model).keys()


def test_an_importance_matrix_of_zeros_is_refused(model, samples):
    dead = copy.deepcopy(model)
    dead.model.layers[1].input_layernorm.weight.data.zero_()
    with pytest.raises(InputError, match=r"the importance matrix of 1\.self_attn\.q_proj is zero or not finite"):
        llamacpp.importance(dead, linears_of(dead), samples)


def test_without_llamacpp_the_line_to_install_it(model, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "ptq161\[llamacpp\]"'):
        llamacpp.quantize_with_llamacpp(model, samples, llamacpp.file_type("Q2_K"), tmp_path / "q.gguf")
    assert not list(tmp_path.iterdir())


@pytest.fixture(
    scope="module",
    params=["Q2_K", pytest.param("IQ1_S", marks=pytest.mark.slow), pytest.param("IQ2_XXS", marks=pytest.mark.slow)],
)
def quantized(request, model, samples, tmp_path_factory):
    """(type, result, file); the tables of the IQ types take ten seconds to build."""
    if not any(map(find_spec, llamacpp.LIBRARIES)):
        pytest.skip("no llama.cpp is installed")
    path = tmp_path_factory.mktemp("gguf") / "quantized.gguf"
    mix = llamacpp.file_type(request.param)
    return request.param, llamacpp.quantize_with_llamacpp(copy.deepcopy(model), samples, mix, path), path


def test_every_bit_is_in_the_file(quantized):
    _, result, path = quantized
    tensors = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name.startswith("blk.")]
    stored = 8 * sum(tensor.n_bytes for tensor in tensors if len(tensor.shape) == 2)
    assert sum(result.parts.values()) == stored
    weights = sum(linear.weight.numel() for linear in linears_of(result.model).values())
    assert result.bits_per_weight == stored / weights and result.parts["padding"] > 0
    assert result.file_bytes == path.stat().st_size
    assert sum(result.config["types"].values()) == 2 * 7


def test_without_padding_each_type_takes_its_bits(quantized):
    kind, result, _ = quantized
    bits = {"Q2_K": 2.625, "Q3_K": 3.4375, "IQ1_S": 1.5625, "IQ2_XXS": 2.0625}
    mix = llamacpp.file_type(kind)
    wanted = sum(
        bits[mix.type_of(name.split(".")[-1], int(name[0]), 2, 2).name] * linear.weight.numel()
        for name, linear in linears_of(result.model).items()
    )
    assert result.claimed_bits == pytest.approx(wanted / result.weights, rel=1e-4)


def test_quantized_weights_are_near_the_original(quantized, model):
    kind, result, _ = quantized
    most = {"Q2_K": 0.1, "IQ2_XXS": 0.2, "IQ1_S": 0.4}[kind]
    for name, linear in linears_of(result.model).items():
        original = linears_of(model)[name].weight
        error = (linear.weight - original).square().sum() / original.square().sum()
        assert 0 < error < most, name


def test_the_importance_matrix_reaches_the_quantizer(model):
    if not any(map(find_spec, llamacpp.LIBRARIES)):
        pytest.skip("no llama.cpp is installed")
    quantizer, library = llamacpp._library()
    assert library.split()[1]
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(2))
    flat, steep = torch.ones(256), torch.logspace(-3, 3, 256)[torch.randperm(256)]

    def error(matrix):
        kind = gguf.GGMLQuantizationType.Q2_K
        rows = llamacpp._quantized(quantizer, kind, weight.numpy(), matrix.numpy())
        values = torch.from_numpy(gguf.quants.dequantize(rows, kind))
        return float(((values - weight).square() * steep).sum())

    assert error(steep) < 0.8 * error(flat)


def test_a_file_that_cannot_be_written(model, tmp_path):
    widths = Widths.of(model)
    with pytest.raises(InputError, match="cannot write"):
        gguf_export.write_gguf(model, tmp_path / "no" / "such.gguf", widths, widths.padded, {})
