"""Honest bits and bytes: known models from their configurations, packed folders against the files on disk."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build
from safetensors.torch import load_file, save_file

from ptq161.binarize import quantize_weight, salient_columns, salient_count
from ptq161.budget import model_layout
from ptq161.config import SalientRange
from ptq161.contents import header_bytes
from ptq161.discovery import decoder_blocks, linear_shapes, trace
from ptq161.errors import CheckpointError, InputError, UnsupportedModel
from ptq161.inspection import inspect, predict
from ptq161.layout import paper_bits
from ptq161.packing import TensorSpec, pack
from ptq161.saving import save_packed
from ptq161.vocabulary import pack_vocabulary, vocabulary_specs

CONFIGS = Path(__file__).parent / "configs"
RATIO = 0.25

# name -> parameters as published, weights of the blocks' linears (rows * cols worked out by hand), linears, vocabulary
# times hidden size
KNOWN = {
    "llama-7b": (6_738_415_616, 32 * (4 * 4096**2 + 3 * 4096 * 11008), 224, 32000 * 4096),
    "llama-13b": (13_015_864_320, 40 * (4 * 5120**2 + 3 * 5120 * 13824), 280, 32000 * 5120),
    "llama-65b": (65_285_660_672, 80 * (4 * 8192**2 + 3 * 8192 * 22016), 560, 32000 * 8192),
    "llama-2-70b": (68_976_648_192, 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672), 560, 32000 * 8192),
    "llama-3-8b": (8_030_261_248, 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 224, 128256 * 4096),
}


VARIANTS = {
    **{name: (name, {}) for name in KNOWN},
    "llama-7b at 20 %": ("llama-7b", {"salient_ratio": 0.2}),
    "llama-7b without salient columns": ("llama-7b", {"salient_ratio": 0.0}),
    "llama-7b at 2 bits": ("llama-7b", {"bits": 2.0}),
    "llama-7b with mixed widths": ("llama-7b", {"method": "mixed"}),
}


@pytest.fixture(scope="module")
def sizes():
    """What inspect says of the known models' bare configurations.

    In a process of its own: the search for the ratio makes a million small layouts, and there their types are not
    checked one by one as they are here, which takes two minutes.
    """
    jobs = {key: (str(CONFIGS / f"{name}.json"), budget) for key, (name, budget) in VARIANTS.items()}
    code = """
import json, sys
from ptq161 import inspect
print(json.dumps({key: inspect(path, **budget) for key, (path, budget) in json.loads(sys.argv[1]).items()}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(jobs)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
        check=True,
    )
    return json.loads(done.stdout)


def assert_adds_up(sizes):
    stored = sum(sizes["parts"].values())
    assert stored + sizes["other_bytes"] + sizes["header_bytes"] == sizes["file_bytes"]
    assert sizes["bits_per_weight"] == 8 * stored / sizes["quantized_weights"]
    assert sum(layer["bytes"] for layer in sizes["layers"]) == stored


@pytest.mark.parametrize("name", KNOWN)
def test_known_models(sizes, name):
    parameters, weights, linears, embedding = KNOWN[name]
    found = sizes[name]
    assert_adds_up(found)
    assert (found["quantized_weights"], found["quantized_linears"], found["dense_linears"]) == (weights, linears, 0)
    assert found["embedding_bytes"] == found["head_bytes"] == 2 * embedding
    assert found["other_bytes"] == 2 * (parameters - weights)  # all that is not quantized, at 16 bits
    assert 1.6085 < found["bits_per_weight"] <= 1.61
    assert 9.93 < found["times_smaller"] == 2 * weights / sum(found["parts"].values())
    assert found["measured"] is False


def test_salient_ratio_within_the_default_bits(sizes):
    assert sizes["llama-7b"]["salient_ratio"] == pytest.approx(0.198, abs=0.0005)
    assert sizes["llama-65b"]["salient_ratio"] > 0.2  # row vectors weigh less on wide layers


def test_the_papers_table_is_quoted_for_its_models_only(sizes):
    quoted = {name: sizes[name]["paper_table_13"] for name in KNOWN if sizes[name]["paper_table_13"] is not None}
    assert quoted == {
        "llama-7b": {"model": "LLaMA-7B", "bytes": 1.41e9},
        "llama-13b": {"model": "LLaMA-13B", "bytes": 2.68e9},
    }
    assert sizes["llama-7b"]["file_bytes"] == pytest.approx(1.83e9, rel=0.005)
    assert sum(sizes["llama-7b"]["parts"].values()) == pytest.approx(1.30e9, rel=0.005)


def test_appendix_a_formula():
    weight_bits, index_bits, additional_bits = 1.6, 1 / (4096 * 1.6), 0.0078125
    assert round(index_bits, 6) == 0.000153
    assert paper_bits(4096, 4096, 0.2) == pytest.approx(weight_bits + index_bits + additional_bits, rel=1e-12)
    assert round(paper_bits(4096, 4096, 0.2), 2) == 1.61


def test_appendix_a_formula_on_the_real_layers(sizes):
    layers = sizes["llama-7b at 20 %"]["layers"]
    square = next(layer for layer in layers if layer["rows"] == layer["cols"] == 4096)
    assert square["columns"] == {"1bit": 3277, "4bit": 819}
    assert square["paper_bits"] == pytest.approx(paper_bits(4096, 4096, 819 / 4096), rel=1e-12)
    assert round(square["paper_bits"], 2) == 1.61
    assert square["bits_per_weight"] > square["paper_bits"]  # the file also holds means, zero points and both scales
    assert sorted(layer["linears"] for layer in layers) == [32, 64, 128]


def test_bytes_of_the_square_layers_by_hand(sizes):
    """Per 4096 x 4096 linear of LLaMA-7B at 20 %; q holds the column types for k and v, o holds its own."""
    layers = sizes["llama-7b at 20 %"]["layers"]
    layer = next(layer for layer in layers if layer["rows"] == layer["cols"] == 4096)
    codes = 4096 * (-(-3277 // 8) + -(-819 // 2))
    vectors = 4096 * 2 * 3 + 4096 // 2 + 3277 * 2  # scale_0, mean_0, scale_1; zero_1; col_0
    assert layer["bytes"] == 128 * (codes + vectors) + 64 * 512


def test_bits_and_ratio_change_the_prediction(sizes):
    more, none = sizes["llama-7b at 2 bits"], sizes["llama-7b without salient columns"]
    assert sizes["llama-7b"]["file_bytes"] < more["file_bytes"]
    assert 1.999 < more["bits_per_weight"] <= 2.0
    # Scale and mean per row and one column scale, in float16, on the three shapes of layers.
    vectors = 4 * (4096 * 2 + 4096) + 2 * (11008 * 2 + 4096) + (4096 * 2 + 11008)
    assert none["bits_per_weight"] == pytest.approx(1 + 16 * 32 * vectors / none["quantized_weights"], rel=1e-12)
    assert none["salient_ratio"] == 0 and none["parts"]["codes_4bit"] == none["parts"]["columns"] == 0


def test_mixed_widths_use_the_budget_to_the_last_hundredth_of_a_percent(sizes):
    mixed, paper = sizes["llama-7b with mixed widths"], sizes["llama-7b"]
    assert_adds_up(mixed)
    assert 1.6095 < mixed["bits_per_weight"] <= 1.61
    assert mixed["quantized_weights"] == paper["quantized_weights"]
    assert mixed["other_bytes"] == paper["other_bytes"]
    assert mixed["paper_bits"] is None
    assert mixed["parts"]["codes_ternary"] > mixed["parts"]["codes_1bit"] > 0
    # One float16 scale per row and group, and nothing else besides codes and column types.
    scales = [layer["linears"] * layer["rows"] * len(layer["columns"]) for layer in mixed["layers"]]
    assert mixed["parts"]["scales"] == 2 * sum(scales) < paper["parts"]["scales"]


def test_unknown_method_is_named(llama_folder):
    with pytest.raises(InputError, match=r"unknown method 'mixd' \(did you mean 'mixed'\?\)"):
        inspect(llama_folder, method="mixd")


def packed_model(folder, family, tokenizer, *, dtype=torch.bfloat16, blocks=(0, 2), int8_head=False, **saving):
    """Save a tiny model packed without calibration: (model, layout)."""
    model = build(FAMILIES[family]())
    prefix, block_list = decoder_blocks(model)
    traced = trace(model, block_list, torch.zeros(1, 4, dtype=torch.int64))
    shapes = linear_shapes(model, prefix, block_list, traced)
    wanted = tuple(f"{prefix}.{index}." for index in range(*blocks))
    layout = model_layout({name: s for name, s in shapes.items() if name.startswith(wanted)}, RATIO, row_mean=True)
    packed = {}
    for name, spec in layout.linears.items():
        weight = model.get_submodule(name).weight.detach()
        salient = salient_columns(torch.arange(weight.shape[1]).float(), salient_count(RATIO, weight.shape[1]))
        tensors = pack(quantize_weight(weight, salient, salient_range=SalientRange.ROW, row_mean=True)).tensors
        packed |= {f"{name}.{tensor}": tensors[tensor] for tensor in spec.specs()}
    if int8_head:
        layout = replace(layout, vocabulary=vocabulary_specs(model))
        packed |= pack_vocabulary(model.state_dict(), layout.vocabulary)
    save_packed(folder, model, layout, packed, dtype=dtype, run={}, tokenizer=tokenizer, **saving)
    return model, layout


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory, tokenizer):
    """A packed tiny Llama. Do not write into it."""
    folder = tmp_path_factory.mktemp("packed") / "llama"
    packed_model(folder, "llama", tokenizer)
    return folder


@pytest.fixture
def writable(packed_folder, tmp_path):
    """A copy of the packed folder, and its one weight file."""
    folder = tmp_path / "packed"
    shutil.copytree(packed_folder, folder)
    return folder, folder / "model.safetensors"


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma2", "phi3", "opt", "gpt-neox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_prediction_and_measurement_are_the_files_on_disk(tmp_path, tokenizer, family, dtype):
    model, layout = packed_model(tmp_path / "packed", family, tokenizer, dtype=dtype)
    measured = inspect(tmp_path / "packed")
    assert measured["file_bytes"] == sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    assert_adds_up(measured)
    assert predict(model, layout, dtype) == measured | {"measured": False}
    if dtype is torch.bfloat16:  # which is what a bare configuration is predicted with
        (tmp_path / "config.json").write_text(FAMILIES[family]().to_json_string())
        assert inspect(tmp_path / "config.json", salient_ratio=RATIO) == measured | {"measured": False}
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    assert measured["other_bytes"] == sum(t.nbytes for n, t in tensors.items() if n not in layout.tensor_specs())
    embedding = model.get_input_embeddings().weight
    width = 2 if dtype is torch.bfloat16 else 4
    tied = model.get_output_embeddings().weight is embedding
    assert tied == (family in {"llama-tied", "gemma2", "opt"})
    assert measured["embedding_bytes"] == embedding.numel() * width
    assert measured["head_bytes"] == (0 if tied else embedding.numel() * width)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "gpt-neox"])
def test_int8_head_is_predicted_and_counted_apart(tmp_path, tokenizer, family):
    model, layout = packed_model(tmp_path / "packed", family, tokenizer, int8_head=True)
    measured = inspect(tmp_path / "packed")
    assert_adds_up(measured)
    assert predict(model, layout, torch.bfloat16) == measured | {"measured": False}
    (tmp_path / "config.json").write_text(FAMILIES[family]().to_json_string())
    plain = inspect(tmp_path / "config.json", salient_ratio=RATIO)
    assert inspect(tmp_path / "config.json", salient_ratio=RATIO, head="int8") == measured | {"measured": False}
    assert (measured["bits_per_weight"], measured["parts"]) == (plain["bits_per_weight"], plain["parts"])
    assert (measured["vocabulary_bits"], plain["vocabulary_bits"]) == (8.5, None)
    saved = sum(plain[key] - measured[key] for key in ("embedding_bytes", "head_bytes"))
    assert plain["other_bytes"] - measured["other_bytes"] == saved > 0


def test_unknown_heads_are_refused(llama_folder, packed_folder):
    with pytest.raises(InputError, match="head='int9': expected keep or int8"):
        inspect(llama_folder, head="int9")
    with pytest.raises(InputError, match="packed already"):
        inspect(packed_folder, head="int8")


def test_prediction_from_the_config_is_the_file_on_disk(llama_folder, packed_folder):
    measured = inspect(packed_folder)
    assert inspect(llama_folder, salient_ratio=RATIO) == measured | {"measured": False}
    assert inspect(llama_folder / "config.json", salient_ratio=RATIO) == measured | {"measured": False}


def test_several_files(tmp_path, tokenizer):
    model, layout = packed_model(tmp_path / "packed", "llama", tokenizer, shard_bytes=5_000)
    files = list((tmp_path / "packed").glob("*.safetensors"))
    assert len(files) > 1
    measured = inspect(tmp_path / "packed")
    assert measured["file_bytes"] == sum(file.stat().st_size for file in files)
    assert predict(model, layout, torch.bfloat16, shard_bytes=5_000) == measured | {"measured": False}


def test_blocks_left_dense_are_counted_apart(tmp_path, tokenizer):
    packed_model(tmp_path / "packed", "llama", tokenizer, blocks=(1, 2))
    measured = inspect(tmp_path / "packed")
    assert (measured["quantized_linears"], measured["dense_linears"]) == (7, 7)
    assert measured["quantized_weights"] == 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert measured["other_bytes"] > 2 * measured["quantized_weights"]


def test_header_of_mixed_dtypes_is_as_safetensors_writes_it(tmp_path):
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16]
    dtypes += [torch.int32, torch.float32, torch.float64, torch.int64]
    specs = {f"{'é' * i}name": TensorSpec((3,) * (i % 4), dtype, "other") for i, dtype in enumerate(dtypes)}
    tensors = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    save_file(tensors, tmp_path / "file.safetensors", {"format": "pt"})
    data = sum(spec.nbytes for spec in specs.values())
    assert header_bytes(specs) + data == (tmp_path / "file.safetensors").stat().st_size


def test_bits_for_what_is_packed_already(packed_folder):
    with pytest.raises(InputError, match="packed already"):
        inspect(packed_folder, bits=1.61)


def test_bits_below_the_floor_name_the_lowest(llama_folder):
    with pytest.raises(InputError, match=r"bits=1\.61 cannot be reached .* lowest figure to \d\.\d+ bits"):
        inspect(llama_folder)


def test_no_model(tmp_path):
    with pytest.raises(InputError, match="config"):
        inspect(tmp_path)


def test_no_decoder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UnsupportedModel, match="vit"):
        inspect(tmp_path)


def test_truncated_file(writable):
    folder, file = writable
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: is not a readable safetensors file: .*run `ptq161 verify`"
    ):
        inspect(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", (2**62).to_bytes(8, "little")])
def test_no_safetensors_file(writable, content):
    folder, file = writable
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a readable safetensors file"):
        inspect(folder)


def change(file, **changes):
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors[name] = tensor
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.scale_0"


@pytest.mark.parametrize(
    ("tensor", "found"), [(None, "missing"), (torch.zeros(4).half(), r"F16\[4\]"), (torch.zeros(48), r"F32\[48\]")]
)
def test_tensor_that_is_not_as_the_config_says(writable, tensor, found):
    folder, file = writable
    change(file, **{NAME: tensor})
    with pytest.raises(CheckpointError, match=rf"tensor {NAME} is {found}, expected F16\[48\]"):
        inspect(folder)


def test_tensor_in_two_files(writable):
    folder, file = writable
    save_file({NAME: load_file(file)[NAME]}, folder / "more.safetensors")
    with pytest.raises(CheckpointError, match=rf"more\.safetensors: tensor {NAME} is in another file"):
        inspect(folder)


def test_file_that_is_a_link_out_of_the_folder(writable, tmp_path):
    folder, file = writable
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="link to a file outside"):
        inspect(folder)


def test_other_format_version(writable):
    folder, _ = writable
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: packed format version is 99"):
        inspect(folder)
