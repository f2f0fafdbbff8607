import json
import shutil

import gguf
import numpy
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from families import FAMILIES, build
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ptq161 import sources
from ptq161.errors import InputError, UnsupportedModel
from ptq161.pipeline import quantize
from ptq161.sources import open_config, open_dense, open_model


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A copy of the tiny Llama that a test may spoil."""
    return shutil.copytree(llama_folder, tmp_path / "model")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)


def permuted(weight, heads):
    """The row order in which llama.cpp keeps query and key weights (its rotary halves are interleaved)."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny Llama as llama.cpp would write it, float32, with a small tokenizer; and the original model."""
    model = build(FAMILIES["llama"]())
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<pad>", *(chr(33 + index) for index in range(91)), "ab", "cd"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 93)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
        "model.layers": "blk",
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in state.items():
        part = name.split(".")[-2]
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, (permuted(weight, heads[part]) if part in heads else weight).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


# What can be opened


def test_a_folder_opens_as_stored_with_its_tokenizer(llama_folder, tokenizer):
    model, opened = open_model(llama_folder)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.dtype == torch.float32 and not model.training
    assert opened("The river")["input_ids"] == tokenizer("The river")["input_ids"]
    original = build(FAMILIES["llama"]()).state_dict()
    assert all(torch.equal(original[name], value) for name, value in model.state_dict().items())


def test_a_name_as_text_and_a_dtype_are_taken(llama_folder):
    assert open_model(str(llama_folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert open_dense(str(llama_folder), dtype=torch.float16)[0].whole().dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_model_says_what_it_was_stored_in(folder, dtype):
    build(FAMILIES["llama"]()).to(dtype).save_pretrained(folder)
    dense, tokenizer = open_dense(folder)
    assert dense.dtype == dense.skeleton.dtype == dense.whole().dtype == dtype
    assert tokenizer.bos_token_id == 0


def test_a_gguf_computes_what_its_model_did(gguf_file):
    path, original = gguf_file
    dense, _ = open_dense(path)
    assert dense.dtype == dense.skeleton.dtype == torch.float32 and dense.resident
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(dense.whole()(tokens).logits, original(tokens).logits)


@pytest.mark.parametrize("opening", [open_dense, open_model])
def test_a_gguf_is_parsed_once_for_all_parts_and_again_for_the_next_model(opening, gguf_file, monkeypatch):
    parsed, listed, names = [], [], gguf.get_tensor_name_map

    class Counted(gguf.GGUFReader):
        def __init__(self, path):
            parsed.append(path)
            super().__init__(path)

    def counted(*arguments):
        listed.append(arguments)
        return names(*arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    monkeypatch.setattr(gguf, "get_tensor_name_map", counted)
    for times in (1, 2):
        opening(gguf_file[0])
        assert parsed == [str(gguf_file[0])] * times
        assert len(listed) == times
        assert gguf.GGUFReader is Counted and gguf.get_tensor_name_map is counted


def test_a_gguf_can_be_saved_again(gguf_file, tmp_path):
    dense, tokenizer = open_dense(gguf_file[0])
    dense.whole().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again, tokenizer_again = open_dense(tmp_path)
    assert all(torch.equal(value, dense.weights[name]) for name, value in again.weights.items())
    assert tokenizer_again("abc!")["input_ids"] == tokenizer("abc!")["input_ids"]


def test_a_gguf_tokenizer_has_the_files_special_tokens(gguf_file):
    model, tokenizer = open_model(gguf_file[0], dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer('!"#ab')["input_ids"] == [3, 4, 5, 94]


def test_a_configuration_opens_from_a_folder_a_bare_file_or_a_gguf(llama_folder, gguf_file, tmp_path):
    bare = tmp_path / "llama-tiny.json"
    shutil.copy(llama_folder / "config.json", bare)
    for path in (llama_folder, str(llama_folder), bare, str(bare), gguf_file[0]):
        config = open_config(path)
        assert type(config) is transformers.LlamaConfig
        assert (config.hidden_size, config.num_hidden_layers) == (32, 2)


def test_nothing_is_printed_and_the_switches_are_left_as_found(gguf_file, llama_folder, capfd):
    begin, verbosity = tqdm.__init__, transformers.utils.logging.get_verbosity()
    open_model(gguf_file[0])
    open_model(llama_folder)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert tqdm.__init__ is begin
    assert transformers.utils.logging.get_verbosity() == verbosity


@pytest.fixture(scope="module")
def packed_folder(llama_folder, calibration_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    few = {"samples": 2, "seqlen": 16, "epochs": 0}
    quantize(llama_folder, out, preset="fast", calib=str(calibration_file), salient_ratio=0.2, device="cpu", **few)
    return out


def test_a_packed_checkpoint_opens_in_every_mode(packed_folder, llama_folder, tokenizer):
    tokens = torch.arange(30)[None]
    logits = {}
    for mode in ("packed", "dense", "auto"):
        model, opened = open_model(packed_folder, dtype=torch.float32, mode=mode, activations="float32")
        assert opened("The river")["input_ids"] == tokenizer("The river")["input_ids"]
        with torch.no_grad():
            logits[mode] = model(tokens).logits
    torch.testing.assert_close(logits["packed"], logits["dense"])
    torch.testing.assert_close(logits["packed"], logits["auto"])
    with torch.no_grad():
        assert not torch.allclose(logits["packed"], open_model(llama_folder)[0](tokens).logits, atol=1e-2)


def test_a_packed_checkpoint_is_not_quantized_again(packed_folder):
    refused(packed_folder, "is a packed ptq161 checkpoint: give the model it was made from")


# What cannot


def refused(path, message, kind=InputError, opener=open_dense):
    with pytest.raises(kind, match=message) as error:
        opener(path)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "path", ["./missing", "/no/such/model", "a/b/c", "~/model", "x.json", "missing.gguf", "dir/missing.gguf"]
)
@pytest.mark.parametrize("opener", [open_dense, open_model, open_config])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(monkeypatch, path, opener):
    monkeypatch.setattr(sources, "hub_reachable", lambda: pytest.fail("asked the hub"))
    refused(path, "does not exist", opener=opener)


@pytest.mark.parametrize("name", ["org/name", "gpt2", "HuggingFaceTB/SmolLM2-135M"])
def test_a_hub_name_that_cannot_be_reached_says_so(monkeypatch, tmp_path, offline, name):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    refused(name, f"{name} is neither a local folder or file nor a model from the Hugging Face hub")


def test_a_folder_that_is_no_model_is_named(tmp_path):
    refused(tmp_path, "is a folder without config.json")
    (tmp_path / "llama.gguf").write_bytes(b"GGUF")
    refused(tmp_path, r"did you mean .*llama\.gguf\?")


def test_a_file_that_is_no_gguf_is_named(tmp_path):
    for name in ("model.bin", "model.gguf"):
        (tmp_path / name).write_bytes(b"PK whatever")
        refused(tmp_path / name, f"{name} is not a GGUF file")


def test_a_damaged_gguf_is_named(gguf_file, tmp_path):
    whole = gguf_file[0].read_bytes()
    for size in (4, 20, 300, len(whole) // 2, len(whole) - 100):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        refused(path, r"cannot load the (configuration|tokenizer|weights) of .*cut\.gguf")


def test_a_gguf_of_an_unknown_architecture_is_named(tmp_path):
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "no-such-architecture")
    writer.add_block_count(1)
    writer.add_tensor("x", numpy.zeros((2, 2), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, "no-such-architecture")


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ("{nope", InputError, "not a valid JSON file"),
        ("[]", InputError, "cannot load the configuration"),
        ("{}", InputError, "model_type"),
        ('{"model_type": "no_such_model"}', InputError, "no_such_model"),
        ('{"model_type": "t5"}', UnsupportedModel, "is a t5 model: expected a decoder"),
        ('{"model_type": "llama", "hidden_size": "wide"}', InputError, "cannot load the configuration"),
    ],
)
@pytest.mark.parametrize("opener", [open_dense, open_config])
def test_a_bad_configuration_is_refused(folder, config, kind, message, opener):
    (folder / "config.json").write_text(config)
    refused(folder, message, kind, opener)


def test_damaged_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1], b"", b"\xff" * 100):
        weights.write_bytes(damaged)
        refused(folder, "cannot load the weights of")
    weights.unlink()
    refused(folder, "cannot load the weights of")


def test_missing_and_misshapen_tensors_are_named_not_made_up(folder):
    path, name = folder / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(path)
    original = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    refused(folder, f"lacks {name}")
    save_file(tensors | {name: original[:3].clone()}, path, metadata={"format": "pt"})
    refused(folder, f"has the wrong shape for {name}")


def test_a_model_without_tokenizer_is_refused(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    refused(folder, "cannot load the tokenizer of")


def test_a_checkpoint_quantized_by_another_method_is_not_quantized_again(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, r"is quantized already \(gptq\)")


def test_code_that_comes_with_a_model_is_not_run(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.StrangeConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text("raise SystemExit('this code was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for permission"))
    refused(folder, "cannot load the configuration of")


def test_a_dense_model_has_no_packed_mode(llama_folder):
    with pytest.raises(InputError, match="unknown mode 'packt'"):
        open_model(llama_folder, mode="packt")
    with pytest.raises(InputError, match="is not a packed ptq161 checkpoint"):
        open_model(llama_folder, mode="packed")


def test_weights_are_not_allocated_before_they_are_dropped():
    """Two terabytes in each matrix of the MLP: to allocate that even for a moment would fail."""
    config = FAMILIES["llama"]()
    config.hidden_size, config.intermediate_size = 2**19, 2**20
    with init_empty_weights(include_buffers=False), sources._EmptyOnMeta():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.model.rotary_emb.inv_freq.isfinite().all(), "what no checkpoint holds has to be there"
