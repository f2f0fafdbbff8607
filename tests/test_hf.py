"""Packed checkpoints: what is written, that it loads in transformers as the dense reconstruction, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build
from packed import install, quantize_linears, write_packed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GgufConfig

import ptq161
from ptq161 import hf
from ptq161.errors import CheckpointError, InputError
from ptq161.kernels import cpu_kernels
from ptq161.layout import ModelLayout
from ptq161.linear import PackedLinear
from ptq161.packing import FORMAT_VERSION
from ptq161.verify import verify

TOKENS = torch.arange(3, 15)[None]
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory, tokenizer):
    """An untied Llama saved in float32. Do not write into it."""
    folder = tmp_path_factory.mktemp("packed") / "llama"
    write_packed(folder, tokenizer=tokenizer)
    return folder


@pytest.fixture
def folder(packed_folder, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(packed_folder, tmp_path / "model"))


def logits(model):
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits


def kinds(model):
    return {type(module) for name, module in model.named_modules() if name.endswith("_proj")}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def rewrite(folder, change):
    """Let `change` edit the dict of tensors, and drop the checksums so that other checks have to find it."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    reconfigure(folder, lambda quantization: quantization.pop("checksums"))
    (folder / "checksums.json").unlink()


def reconfigure(folder, change):
    config = config_of(folder)
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


# Loading


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("mode", ["packed", "dense", "auto"])
def test_loaded_model_is_the_dense_reconstruction(tmp_path, family, mode):
    expected = write_packed(tmp_path / "model", family)
    model = hf.load(tmp_path / "model", mode=mode, activations="float32")
    torch.testing.assert_close(logits(model), logits(expected))
    packed = mode == "packed" or (mode == "auto" and cpu_kernels())
    assert kinds(model) == {PackedLinear if packed else nn.Linear}
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == (family == "llama-tied")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_and_dense_agree_in_every_dtype(packed_folder, dtype):
    models = [hf.load(packed_folder, dtype=dtype, mode=mode, activations="float32") for mode in ("packed", "dense")]
    assert [model.dtype for model in models] == [dtype, dtype]
    scale = logits(models[1]).abs().max()
    torch.testing.assert_close(
        logits(models[0]) / scale, logits(models[1]) / scale, rtol=0, atol=16 * torch.finfo(dtype).eps
    )


def test_from_pretrained_and_generate(packed_folder):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    assert kinds(model) == {PackedLinear} and not model.training
    assert model.is_quantized and model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()
    tokenizer = AutoTokenizer.from_pretrained(packed_folder)
    inputs = tokenizer("The river", return_tensors="pt")
    outputs = [
        m.generate(input_ids=inputs.input_ids, max_new_tokens=8, do_sample=False)
        for m in (model, hf.load(packed_folder, mode="dense"))
    ]
    assert outputs[0].shape[1] > inputs.input_ids.shape[1]
    assert torch.equal(*outputs)


def test_public_name_is_the_same_function():
    assert ptq161.load is hf.load


def test_loaded_tensors_keep_their_dtypes_and_share_column_types(packed_folder):
    model = hf.load(packed_folder, dtype=torch.bfloat16, mode="packed")
    layout = model.hf_quantizer.quantization_config.layout
    for name, spec in layout.linears.items():
        linear = model.get_submodule(name)
        assert {n: t.dtype for n, t in linear.packed().tensors.items()} == {
            n: s.dtype for n, s in spec.layout.specs().items()
        }
        owner = model.get_submodule(spec.columns_from or name)
        shared = "order" if linear.is_tiled else "column_types"
        assert linear.is_tiled == bool(cpu_kernels())
        assert (linear if linear.is_tiled else owner).get_buffer(shared) is owner.get_buffer(shared)
    assert layout.linears["model.layers.0.self_attn.k_proj"].columns_from == Q_PROJ
    assert "model.layers.0.self_attn.k_proj.column_types" not in model.state_dict()


def test_an_input_embedding_can_be_trained_through_packed_linears(packed_folder):
    model = hf.load(packed_folder, mode="packed")
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("available", "mode", "expected"),
    [(10**12, "auto", nn.Linear), (0, "auto", PackedLinear), (None, "auto", PackedLinear), (0, "dense", nn.Linear)],
)
def test_auto_unpacks_only_into_half_of_the_memory(packed_folder, monkeypatch, available, mode, expected):
    monkeypatch.setattr(hf, "available_memory_bytes", lambda: available)
    monkeypatch.setattr(hf, "has_fast_kernel", lambda device: False)
    assert kinds(hf.load(packed_folder, mode=mode)) == {expected}


def test_auto_counts_the_dense_bytes(packed_folder, monkeypatch):
    monkeypatch.setattr(hf, "has_fast_kernel", lambda device: False)
    weights = ModelLayout.from_dict(config_of(packed_folder)["quantization_config"]).quantized_weights
    for available, expected in ((2 * 4 * weights, nn.Linear), (2 * 4 * weights - 2, PackedLinear)):
        monkeypatch.setattr(hf, "available_memory_bytes", lambda available=available: available)
        assert kinds(hf.load(packed_folder)) == {expected}


def test_auto_stays_packed_with_a_fast_kernel(packed_folder, monkeypatch):
    monkeypatch.setattr(hf, "has_fast_kernel", lambda device: device.type == "cpu")
    assert kinds(hf.load(packed_folder)) == {PackedLinear}


def test_a_snapshot_of_the_hugging_face_cache_loads(folder, tmp_path):
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert verify(snapshot) == {"ok": True, "problems": []}
    assert kinds(hf.load(snapshot, mode="packed")) == {PackedLinear}


# Saving


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_unquantized_tensors_are_stored_once_in_the_asked_dtype(tmp_path, family):
    write_packed(tmp_path, family, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    specs = ModelLayout.from_dict(config_of(tmp_path)["quantization_config"]).tensor_specs()
    assert {n: (tuple(stored[n].shape), stored[n].dtype) for n in specs} == {
        n: (s.shape, s.dtype) for n, s in specs.items()
    }
    others = stored.keys() - specs.keys()
    assert {stored[name].dtype for name in others} == {torch.bfloat16}
    assert ("lm_head.weight" in others) == (family == "llama")
    assert (f"{Q_PROJ}.bias" in others) == (family == "llama-tied")
    assert config_of(tmp_path)["dtype"] == "bfloat16"
    assert hf.load(tmp_path).dtype == torch.bfloat16


def test_dtype_none_keeps_the_models(tmp_path):
    model = build(FAMILIES["llama"]()).half()
    layout, packed = quantize_linears(model)
    hf.save_packed(tmp_path, model, layout, packed, dtype=None, run={}, tokenizer=None)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert config_of(tmp_path)["dtype"] == "float16"


def test_everything_but_the_timing_is_the_same_bytes_again(tmp_path, tokenizer):
    for name in ("one", "two"):
        write_packed(tmp_path / name, "llama", tokenizer=tokenizer, shard_bytes=10_000)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "run.json",
        "README.md",
        "checksums.json",
    } < files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]


def test_config_carries_the_layout_and_drops_the_sources_format(tmp_path):
    model = build(FAMILIES["llama"]())
    model.config.quantization_config = GgufConfig(gguf_file="source.gguf")
    layout, packed = quantize_linears(model)
    run = {"provenance": {"recipe": "test"}}
    hf.save_packed(tmp_path, model, layout, packed, dtype=torch.bfloat16, run=run, tokenizer=None)
    quantization = config_of(tmp_path)["quantization_config"]
    assert "gguf" not in (tmp_path / "config.json").read_text()
    assert ModelLayout.from_dict(quantization) == layout
    assert quantization["quant_method"] == "ptq161" and quantization["format_version"] == FORMAT_VERSION
    assert quantization["bits_per_weight"] == layout.bits_per_weight
    assert quantization["ptq161_version"] == ptq161.__version__
    assert quantization["provenance"] == {"recipe": "test"}
    assert isinstance(model.config.quantization_config, GgufConfig)  # the caller's model is left alone
    assert model.config.dtype == torch.float32


def test_shards_stay_below_the_limit_and_load(tmp_path):
    limit = 10_000
    expected = write_packed(tmp_path, "llama", shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    sizes = [sum(t.nbytes for t in load_file(tmp_path / file).values()) for file in files]
    largest = max(t.nbytes for t in expected.state_dict().values())
    assert max(sizes) <= max(limit, largest)
    assert index["metadata"]["total_size"] == sum(sizes)
    assert verify(tmp_path) == {"ok": True, "problems": []}
    torch.testing.assert_close(logits(hf.load(tmp_path, activations="float32")), logits(expected))


def test_packed_tensors_are_fetched_shard_by_shard(tmp_path):
    model = build(FAMILIES["llama"]())
    layout, packed = quantize_linears(model)
    save_file(packed, tmp_path / "work.safetensors")

    fetched = []

    class OnDisk(Mapping):
        """Reads a tensor from disk each time it is asked for."""

        def __getitem__(self, name):
            fetched.append((name, len(list((tmp_path / "out").glob("*.safetensors")))))
            with safe_open(tmp_path / "work.safetensors", "pt") as file:
                return file.get_tensor(name)

        def __iter__(self):
            return iter(packed)

        def __len__(self):
            return len(packed)

    hf.save_packed(tmp_path / "out", model, layout, OnDisk(), dtype=None, run={}, tokenizer=None, shard_bytes=10_000)
    names, shards_done = zip(*fetched, strict=True)
    assert set(names) == set(packed)
    assert len(names) <= len(packed) + 2  # each once; the type checks of the test run look at an item, too
    assert len(set(shards_done)) > 2  # not all of them before the first file was written
    torch.testing.assert_close(
        logits(hf.load(tmp_path / "out", activations="float32")), logits(install(model, layout, packed))
    )


def test_tensors_mapped_from_a_file_can_be_saved(tmp_path):
    model = build(FAMILIES["llama"]())
    layout, packed = quantize_linears(model)
    save_file(packed, tmp_path / "work.safetensors")
    mapped = load_file(tmp_path / "work.safetensors")
    hf.save_packed(tmp_path / "out", model, layout, mapped, dtype=None, run={}, tokenizer=None)
    assert verify(tmp_path / "out")["ok"]


def test_linears_outside_the_layout_stay_dense(tmp_path):
    model = build(FAMILIES["llama"]())
    layout, packed = quantize_linears(model, keep=lambda name: ".layers.1." in name)
    hf.save_packed(tmp_path, model, layout, packed, dtype=None, run={}, tokenizer=None)
    assert load_file(tmp_path / "model.safetensors")[f"{Q_PROJ}.weight"].dtype == torch.float32
    loaded = hf.load(tmp_path, mode="packed", activations="float32")
    assert kinds(loaded.model.layers[0]) == {nn.Linear} and kinds(loaded.model.layers[1]) == {PackedLinear}
    torch.testing.assert_close(logits(loaded), logits(install(model, layout, packed)))


def test_model_card_tells_how_to_load_and_what_was_done(packed_folder):
    card = (packed_folder / "README.md").read_text()
    bits = config_of(packed_folder)["quantization_config"]["bits_per_weight"]
    for part in (
        "ptq161.load(",
        "import ptq161.hf",
        "from_pretrained",
        f"**{bits:.4f} bits",
        "`tiny`",
        "| `bits` | `1.61` |",
    ):
        assert part in card
    assert "seconds" not in card


def test_weights_are_as_readable_as_the_config(packed_folder):
    modes = {(packed_folder / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1


def test_layout_packed_tensors_and_model_must_belong_together(tmp_path):
    model = build(FAMILIES["llama"]())
    layout, packed = quantize_linears(model)
    without = {name: tensor for name, tensor in packed.items() if name != f"{Q_PROJ}.scale_0"}
    elsewhere = ModelLayout({f"nowhere.{name}": spec for name, spec in layout.linears.items()})
    for wrong_layout, wrong_packed, named in (
        (layout, without, f"{Q_PROJ}.scale_0"),
        (layout, packed | {"stray.weight": packed[f"{Q_PROJ}.weight"]}, "stray.weight"),
        (elsewhere, {f"nowhere.{name}": tensor for name, tensor in packed.items()}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=named):
            hf.save_packed(tmp_path, model, wrong_layout, wrong_packed, dtype=None, run={}, tokenizer=None)


# Saving again with transformers


def test_saving_a_packed_model_again_round_trips(packed_folder, tmp_path):
    model = hf.load(packed_folder, mode="packed")
    model.save_pretrained(tmp_path)
    assert verify(tmp_path) == {"ok": True, "problems": []}
    before, after = (load_file(where / "model.safetensors") for where in (packed_folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(hf.load(tmp_path, mode="packed")), logits(model))


def test_saving_a_dense_one_gives_a_plain_folder(packed_folder, tmp_path):
    model = hf.load(packed_folder, mode="dense")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in config_of(tmp_path) and not hf.is_packed(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(plain), logits(model))
    model.to(torch.bfloat16).float()  # as any dense model


# What is refused


def test_is_packed(packed_folder, llama_folder, tmp_path):
    assert hf.is_packed(packed_folder) and hf.is_packed(str(packed_folder))
    for other in (llama_folder, tmp_path, tmp_path / "missing", packed_folder / "config.json", "some/hub-name"):
        assert not hf.is_packed(other)
    (tmp_path / "config.json").write_text("{")
    assert not hf.is_packed(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"mode": "dens"}, "did you mean 'dense'"), ({"device": "warp"}, "warp")],
)
def test_bad_arguments(packed_folder, arguments, match):
    with pytest.raises((InputError, RuntimeError), match=match):
        hf.load(packed_folder, **arguments)


def test_paths_that_are_no_packed_checkpoint(llama_folder, tmp_path):
    for path, match in ((llama_folder, "not a packed checkpoint"), (tmp_path / "none", "not a folder")):
        with pytest.raises(CheckpointError, match=match) as error:
            hf.load(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("loader", [hf.load, AutoModelForCausalLM.from_pretrained])
def test_another_format_version(folder, loader):
    reconfigure(folder, lambda quantization: quantization.update(format_version=1))
    with pytest.raises(CheckpointError, match=f"format version is 1, this ptq161 reads version {FORMAT_VERSION}"):
        loader(folder)


@pytest.mark.parametrize("loader", [hf.load, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{Q_PROJ}.scale_1", lambda t: t.pop(f"{Q_PROJ}.scale_1")),
        (f"{Q_PROJ}.weight", lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"][:-1].contiguous()})),
        (f"{Q_PROJ}.weight", lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"].to(torch.int8)})),
        (f"{Q_PROJ}.col_0", lambda t: t.update({f"{Q_PROJ}.col_0": t[f"{Q_PROJ}.col_0"].float()})),
        (f"{Q_PROJ}.mean_0", lambda t: t[f"{Q_PROJ}.mean_0"].fill_(float("nan"))),
        (f"{Q_PROJ}.column_types", lambda t: t[f"{Q_PROJ}.column_types"].fill_(255)),
    ],
)
def test_a_bad_packed_tensor_is_named_without_checksums(folder, loader, name, change):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor {name} ") as error:
        loader(folder)
    assert "\n" not in str(error.value)


def test_a_bad_unquantized_tensor_is_named_without_checksums(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
    for loader in (hf.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"tensor model.norm.weight is \[5\], expected \[32\]"):
            loader(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda tensors: tensors.update(stray=torch.ones(2)), "stray does not belong"),
    ],
)
@pytest.mark.parametrize("loader", [hf.load, AutoModelForCausalLM.from_pretrained])
def test_the_files_hold_exactly_the_models_tensors(folder, loader, change, match):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=match):
        loader(folder)


@pytest.mark.parametrize("loader", [hf.load, AutoModelForCausalLM.from_pretrained])
def test_checksums_are_verified(folder, loader):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor .* is not as it was saved"):
        loader(folder)


def test_no_config_can_claim_to_be_checked(folder):
    reconfigure(folder, lambda quantization: quantization.update(checked=hf.Checked.BY_LOAD))
    with pytest.raises(CheckpointError, match=r"config.json: is not as it was saved"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("loader", [hf.load, AutoModelForCausalLM.from_pretrained])
def test_a_table_of_absurd_size_is_refused_before_it_is_made(folder, loader, monkeypatch):
    monkeypatch.setattr("ptq161.contents.MAX_TABLE_BYTES", 8)
    with pytest.raises(CheckpointError, match=r"makes model.rotary_emb.\w+ a table of \d+ bytes"):
        loader(folder)


def test_a_file_whose_tensors_begin_at_an_odd_byte_computes_the_same(tmp_path):
    expected = write_packed(tmp_path / "model", "llama-tied")
    file = tmp_path / "model" / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes((end - 7).to_bytes(8, "little") + content[8:end] + b" " + content[end:])
    model = hf.load(tmp_path / "model", mode="packed", activations="float32")
    torch.testing.assert_close(logits(model), logits(expected))


def test_layout_that_does_not_fit_the_model(folder):
    with pytest.raises(CheckpointError, match="architectures"):
        AutoModel.from_pretrained(folder)
    rewrite(folder, lambda tensors: None)
    config = config_of(folder)
    config["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model.layers.1\S+ of shape \(\d+, \d+\) has no place"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_config_that_transformers_cannot_build(folder):
    rewrite(folder, lambda tensors: None)
    config = config_of(folder) | {"model_type": "no-such-model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json: transformers cannot build this model"):
        hf.load(folder)


def test_weights_outside_the_folder_are_refused(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    for loader in (hf.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"model.safetensors: is a link to a file outside"):
            loader(folder)
    (folder / "model.safetensors").unlink()
    names = load_file(outside)
    for shard in ("../outside.safetensors", str(outside)):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for loader in (hf.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(CheckpointError, match=r"outside.safetensors: is not a plain file name"):
                loader(folder)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: is not safetensors"):
        hf.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: is not safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_quantizing_while_loading_is_refused(llama_folder, packed_folder):
    quantization = hf.PackedConfig(**config_of(packed_folder)["quantization_config"])
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=quantization)


WITHOUT_PLUGIN = """
import sys
from transformers import AutoModelForCausalLM

try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print("LOADED")
except RuntimeError as error:
    print("REFUSED", error)
assert not [name for name in sys.modules if name.startswith("ptq161")]
"""


def test_transformers_without_ptq161_stops_at_the_size_of_the_weights(packed_folder, tmp_path):
    """Recorded with transformers 5.17: a warning, a report of mismatched sizes, then RuntimeError (docs/format.md)."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, str(packed_folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("REFUSED You set `ignore_mismatched_sizes` to `False`")
    assert "Unknown quantization type, got ptq161" in done.stderr
    assert "MISMATCH" in done.stderr


@pytest.mark.gpu
def test_on_a_gpu(packed_folder):
    expected = logits(hf.load(packed_folder))
    for mode in ("packed", "dense", "auto"):
        model = hf.load(packed_folder, device="cuda", mode=mode)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
        torch.testing.assert_close(logits(model).cpu(), expected, rtol=1e-3, atol=1e-3)
