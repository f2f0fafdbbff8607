"""Embedding and head at 8 bits: every family from file to logits, what is stored, what is refused."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build
from packed import write_packed
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ptq161 import hf
from ptq161.binarize import EIGHT_BIT, reconstruct, symmetric_weight
from ptq161.embedding import PackedEmbedding, ScaledEmbedding, TiedHead
from ptq161.errors import CheckpointError, InputError, NonFiniteError, UnsupportedModule
from ptq161.kernels import cpu_kernels
from ptq161.linear import PackedLinear
from ptq161.packing import pack
from ptq161.verify import verify
from ptq161.vocabulary import pack_vocabulary, vocabulary_specs

TOKENS = torch.arange(3, 15).reshape(2, 6)
TIED = ["llama-tied", "gemma2", "gemma3", "opt", "falcon", "falcon-multi-query", "falcon-alibi"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> (folder with an int8 head, the dense model it must equal), written once. Do not write into it."""
    root, made = tmp_path_factory.mktemp("int8"), {}

    def folder(family):
        if family not in made:
            made[family] = (root / family, write_packed(root / family, family, int8_head=True))
        return made[family]

    return folder


@pytest.fixture
def damaged(folders, tmp_path):
    """Copy an untied or tied folder, let a function edit its quantization_config, drop the checksums."""

    def damage(family, change):
        folder = Path(shutil.copytree(folders(family)[0], tmp_path / family))
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].pop("checksums")
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "checksums.json").unlink()
        return folder

    return damage


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


# From file to logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_its_file_holds(family, folders):
    folder, expected = folders(family)
    assert verify(folder)["ok"]
    packed, dense = (hf.load(folder, mode=mode, activations="float32") for mode in ("packed", "dense"))
    tied = family in TIED
    assert isinstance(packed.get_input_embeddings(), PackedEmbedding)
    assert type(packed.get_output_embeddings()) is (TiedHead if tied else PackedLinear)
    assert packed.get_input_embeddings().is_tiled == bool(cpu_kernels())
    assert not any(isinstance(module, PackedLinear | TiedHead) for module in dense.modules())
    assert (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight) == tied
    for model in (packed, dense):
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    original = build(FAMILIES[family]())
    for kind in ("input", "output"):
        weight, rounded = (getattr(m, f"get_{kind}_embeddings")().weight for m in (original, expected))
        error = (weight - rounded).norm() / weight.norm()
        assert 1e-4 < error < 0.01


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_head_keeps_its_activations_whatever_the_linears_do(family, folders):
    models = [hf.load(folders(family)[0], mode="packed", activations=a) for a in ("int8", "float32")]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (model.get_output_embeddings()(x) for model in models)
    assert first.equal(second)
    assert [model.model.layers[0].mlp.up_proj.exact for model in models] == [False, True]


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_each_matrix_is_stored_once_as_bytes_and_scales(family, folders, tmp_path):
    folder, _ = folders(family)
    write_packed(tmp_path / "plain", family)
    tensors, plain = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "plain"))
    names = ["model.embed_tokens"] + ["lm_head"] * (family == "llama")
    assert tensors.keys() - plain.keys() == {f"{name}.scale_0" for name in names}
    assert any(name.startswith("lm_head") for name in tensors) == (family == "llama")
    for name in names:
        assert tensors[f"{name}.weight"].dtype == torch.uint8 and tensors[f"{name}.scale_0"].dtype == torch.float16
        expected = pack(symmetric_weight(plain[f"{name}.weight"], EIGHT_BIT)).tensors
        assert tensors[f"{name}.weight"].equal(expected["weight"])
        assert tensors[f"{name}.weight"].shape == plain[f"{name}.weight"].shape


def test_packing_a_few_rows_at_a_time_changes_nothing(monkeypatch):
    model = build(FAMILIES["llama"]())
    specs = vocabulary_specs(model)
    whole = pack_vocabulary(model.state_dict(), specs)
    monkeypatch.setattr("ptq161.vocabulary._WEIGHTS_AT_ONCE", 100)
    assert all(tensor.equal(whole[name]) for name, tensor in pack_vocabulary(model.state_dict(), specs).items())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_and_dense_agree_in_sixteen_bits(family, dtype, folders):
    models = [hf.load(folders(family)[0], dtype=dtype, mode=m, activations="float32") for m in ("packed", "dense")]
    assert [model.get_input_embeddings()(TOKENS).dtype for model in models] == [dtype, dtype]
    assert models[0].get_input_embeddings()(TOKENS).equal(models[1].get_input_embeddings()(TOKENS))
    found, expected = map(logits, models)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 32 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
def test_from_pretrained_generates_and_saves_anew(family, folders, tmp_path):
    folder, _ = folders(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    positions = []
    model.get_output_embeddings().register_forward_hook(lambda head, args, y: positions.append(args[0].shape[1]))
    answer = model.generate(TOKENS, **settings)
    assert positions == [1] * 6, "the head computes the last position only"
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    again = hf.load(tmp_path / "again")
    assert again.generate(TOKENS, **settings).equal(answer)
    model.tie_weights()  # nothing is left to tie
    assert model.generate(TOKENS, **settings).equal(answer)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
def test_dequantized_model_is_an_ordinary_one(family, folders, tmp_path):
    dense = hf.load(folders(family)[0], mode="dense")
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(again.get_input_embeddings()) is not ScaledEmbedding
    torch.testing.assert_close(logits(again), logits(dense), rtol=0, atol=0)


def test_without_native_kernels(folders, monkeypatch):
    """The stored order, on any device: the reference computes."""
    monkeypatch.setattr("ptq161.linear.has_tiled_kernel", lambda device: False)
    for family in ("llama", "gemma3"):
        folder, expected = folders(family)
        model = hf.load(folder, mode="packed")
        assert not model.get_input_embeddings().is_tiled
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
        with pytest.raises(IndexError):
            model(torch.tensor([[96]]))


# The modules


@pytest.mark.parametrize("tiled", [False, True])
def test_modules_copy_move_and_keep_their_bytes(folders, tiled):
    model = hf.load(folders("llama-tied")[0], mode="packed")
    if not tiled:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(state)
        assert not model.get_input_embeddings().is_tiled
    other = copy.deepcopy(model)
    assert other.lm_head._embedding[0] is other.model.embed_tokens is not model.model.embed_tokens
    halved = copy.deepcopy(model).to(torch.bfloat16)
    assert halved.get_input_embeddings().dtype == torch.bfloat16
    assert halved.get_input_embeddings()(TOKENS).dtype == torch.bfloat16
    for name, tensor in halved.state_dict().items():
        if "embed_tokens" in name:
            assert tensor.equal(model.state_dict()[name])
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)
    assert "int8 rows" in repr(model) and "tied to the embedding" in repr(model)
    moved = other.to("meta")
    assert moved(TOKENS.to("meta")).logits.shape == (2, 6, 96)


def test_gradients_pass_the_head(folders):
    model = hf.load(folders("llama-tied")[0], mode="packed")
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.norm.weight.grad.abs().sum() > 0


def test_a_tied_head_may_have_a_bias(folders):
    embedding = hf.load(folders("llama-tied")[0], mode="packed").get_input_embeddings()
    x, bias = torch.randn(3, 32), nn.Parameter(torch.randn(96))
    with torch.no_grad():
        assert TiedHead(embedding, bias)(x).equal(TiedHead(embedding, None)(x) + bias)


@pytest.mark.skipif(not cpu_kernels(), reason="the extension is not built")
@pytest.mark.parametrize("token", [-1, 96])
def test_a_token_beyond_the_vocabulary_is_an_error(folders, token):
    model = hf.load(folders("llama-tied")[0])
    with pytest.raises(InputError, match=f"row {token} is out of range: there are 96"):
        model(torch.tensor([[token]]))


COMPILED = """
import sys, torch
from ptq161 import hf
model = hf.load(sys.argv[1], mode="packed")
run = lambda tokens: model.lm_head(model.model.embed_tokens(tokens))
with torch.inference_mode():
    for tokens in (torch.tensor([[5]]), torch.arange(3, 15).reshape(2, 6)):
        assert torch.equal(torch.compile(run, fullgraph=True)(tokens), run(tokens))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_compiles_whole(folders, family):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    command = [sys.executable, "-c", COMPILED, str(folders(family)[0])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# Refused


class Normed(nn.Embedding):
    """An embedding that is more than its rows."""


def test_an_unknown_embedding_or_head_is_refused_in_one_line():
    model = build(FAMILIES["llama-tied"]())
    for change, what in (
        (lambda m: m.set_input_embeddings(Normed(96, 32)), "input embedding of LlamaForCausalLM is Normed"),
        (lambda m: m.set_output_embeddings(nn.Identity()), "LlamaForCausalLM has Identity as its head"),
        (lambda m: setattr(m, "get_output_embeddings", lambda: None), "LlamaForCausalLM has no head"),
    ):
        changed = copy.deepcopy(model)
        change(changed)
        with pytest.raises(UnsupportedModule, match=what) as error:
            vocabulary_specs(changed)
        assert "\n" not in str(error.value) and "--head" in str(error.value) and error.value.exit_code == 2


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e30])
def test_weights_that_are_not_finite_are_an_error_that_names_the_row(bad):
    model = build(FAMILIES["llama"]())
    model.lm_head.weight.data[17, 3] = bad
    with pytest.raises(NonFiniteError, match=r"lm_head\.weight: row 17 has"):
        pack_vocabulary(model.state_dict(), vocabulary_specs(model))


def rename(old, new):
    def change(quantization):
        entries = quantization["vocabulary"]
        entries[new] = entries.pop(old)

    return change


def resize(quantization):
    quantization["layouts"][quantization["vocabulary"]["lm_head"]["layout"]]["rows"] = 97


DAMAGES = {
    "no head": ("llama", lambda q: q["vocabulary"].pop("lm_head")),
    "no embedding": ("llama", lambda q: q["vocabulary"].pop("model.embed_tokens")),
    "other rows": ("llama", resize),
    "other name": ("llama", rename("lm_head", "head")),
    "a norm": ("llama", rename("lm_head", "model.norm")),
    "a tied head": ("llama-tied", lambda q: q["vocabulary"].update(lm_head=q["vocabulary"]["model.embed_tokens"])),
    "none": ("llama-tied", lambda q: q.pop("vocabulary")),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_config_that_does_not_fit_is_refused_through_every_door(kind, damaged):
    folder = damaged(*DAMAGES[kind])
    for load in (hf.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as error:
            load(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensor", "change", "what"),
    [
        ("model.embed_tokens.weight", lambda t: t.float(), "expected torch.uint8"),
        ("model.embed_tokens.weight", lambda t: t[:-1], "expected torch.uint8"),
        ("model.embed_tokens.weight", lambda t: t | 255, "no 8bit code"),
        ("model.embed_tokens.scale_0", lambda t: t * float("nan"), "NaN or infinite"),
        ("model.embed_tokens.scale_0", lambda t: t.float(), "expected torch.float16"),
        ("model.embed_tokens.scale_0", lambda t: None, "is missing"),
    ],
)
def test_damaged_tensors_are_named(tensor, change, what, damaged):
    folder = damaged("llama-tied", lambda quantization: None)
    tensors = load_file(folder / "model.safetensors")
    new = change(tensors.pop(tensor))
    save_file(tensors | ({} if new is None else {tensor: new}), folder / "model.safetensors", {"format": "pt"})
    problems = verify(folder)["problems"]
    assert [(problem["tensor"], what in problem["what"]) for problem in problems] == [(tensor, True)]
    for load in (hf.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=tensor):
            load(folder)


def test_a_changed_byte_is_found(folders, tmp_path):
    folder = Path(shutil.copytree(folders("llama-tied")[0], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][4, 5] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert [problem["tensor"] for problem in verify(folder)["problems"]] == ["model.embed_tokens.weight"]


def test_rows_equal_the_packed_weight(folders):
    folder, _ = folders("llama-tied")
    source = build(FAMILIES["llama-tied"]()).model.embed_tokens.weight.detach()
    embedding = hf.load(folder).get_input_embeddings()
    assert embedding(torch.arange(96)).equal(reconstruct(symmetric_weight(source, EIGHT_BIT)))
    assert embedding(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2, 32)
