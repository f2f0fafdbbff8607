"""`verify` names what is damaged, and survives anything that can lie in a folder."""

import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from packed import write_packed
from safetensors.torch import load_file, save_file

from ptq161.folder import file_checksum, tensor_checksum
from ptq161.hf import load
from ptq161.verify import verify

Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.0.mlp.down_proj"
WEIGHTS, INDEX, CHECKSUMS = "model.safetensors", "model.safetensors.index.json", "checksums.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("verify") / "single"
    write_packed(folder, "llama-tied", tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def sound_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "shards"
    write_packed(folder, shard_bytes=10_000)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture
def sharded(sound_shards, tmp_path):
    return Path(shutil.copytree(sound_shards, tmp_path / "shards"))


def found(folder):
    """(file, tensor) of every problem, after checking the form of the answer."""
    answer = verify(folder)
    assert json.loads(json.dumps(answer)) == answer
    assert answer.keys() == {"ok", "problems"} and answer["ok"] == (not answer["problems"])
    for problem in answer["problems"]:
        assert problem.keys() == {"file", "tensor", "what"} and "\n" not in problem["what"]
    return {(problem["file"], problem["tensor"]) for problem in answer["problems"]}


def what(folder, file, tensor=None):
    """What is said about one file or tensor."""
    said = [p["what"] for p in verify(folder)["problems"] if (p["file"], p["tensor"]) == (file, tensor)]
    assert said, found(folder)
    return " / ".join(said)


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def without_checksums(folder):
    """As transformers leaves a model that it saved: nothing but the weights and config.json to go by."""
    edit_config(folder, lambda config: config["quantization_config"].pop("checksums"))
    (folder / CHECKSUMS).unlink()


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_sound_checkpoints_are_ok(sound, sound_shards):
    assert verify(sound) == verify(str(sound)) == verify(sound_shards) == {"ok": True, "problems": []}


def test_ok_without_checksums_and_with_files_of_no_concern(folder):
    without_checksums(folder)
    (folder / "run.json").unlink()
    (folder / "notes.txt").write_text("mine")
    (folder / ".cache").mkdir()
    assert verify(folder)["ok"]


def test_checksums_cover_every_file_and_tensor_and_are_what_the_format_page_says(sound):
    checksums = json.loads((sound / CHECKSUMS).read_text())
    tensors = load_file(sound / WEIGHTS)
    assert checksums["tensors"] == {name: tensor_checksum(tensor) for name, tensor in sorted(tensors.items())}
    others = {path.name for path in sound.iterdir()} - {WEIGHTS, CHECKSUMS, "README.md"}
    assert checksums["files"].keys() == others
    assert checksums["files"].pop("run.json") is None
    assert checksums["files"] == {name: file_checksum(sound / name) for name in checksums["files"]}
    assert tensor_checksum(torch.zeros(2, 2)) != tensor_checksum(torch.zeros(4))
    assert tensor_checksum(torch.zeros(2, dtype=torch.int16)) != tensor_checksum(torch.zeros(2, dtype=torch.float16))


# Damage


def test_truncation_names_the_lost_tensors(folder):
    file = folder / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    lost = found(folder)
    assert len(lost) > 10 and {name for name, _ in lost} == {WEIGHTS}
    assert None not in {tensor for _, tensor in lost}
    assert "is cut off" in what(folder, *min(lost))


@pytest.mark.parametrize("kept", [0, 4, 8, 100])
def test_truncation_inside_the_header(folder, kept):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    assert found(folder) == {(WEIGHTS, None)}


@pytest.mark.parametrize("checksums", [True, False])
def test_one_changed_bit_of_any_byte_of_data_is_found(folder, checksums):
    """Without checksums only impossible values are; a float16 sign is not one of them."""
    file = folder / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    if checksums:
        ((name, tensor),) = found(folder)
        assert name == WEIGHTS and "not as it was saved" in what(folder, name, tensor)
    else:
        without_checksums(folder)
        assert verify(folder)["ok"]


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", CHECKSUMS, "run.json"]
)
def test_missing_cut_or_changed_files(folder, name):
    content = (folder / name).read_text()
    (folder / name).unlink()
    assert (name, None) in found(folder) and what(folder, name) == "is missing"
    (folder / name).write_text(content[: len(content) // 2])
    assert "is not valid JSON" in what(folder, name)
    (folder / name).write_text("[]")
    assert "holds a JSON list" in what(folder, name)
    (folder / name).write_text(content.replace("a", "b", 1))  # still JSON, in whichever string that was
    assert verify(folder)["ok"] == (name == "run.json")


def test_a_value_changed_in_config_is_found(folder):
    edit_config(folder, lambda config: config.update(rms_norm_eps=1e-3))
    assert found(folder) == {("config.json", None)}


def test_the_model_card_and_the_run_record_may_change(folder):
    (folder / "README.md").unlink()
    (folder / "run.json").write_text("{}")
    assert verify(folder)["ok"]


def test_missing_changed_and_foreign_tensors_with_checksums(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(f"{Q_PROJ}.zero_1")
    tensors["model.norm.weight"][0] += 1
    tensors["stray"] = torch.ones(1)
    save_file(tensors, folder / WEIGHTS)
    assert found(folder) == {(WEIGHTS, f"{Q_PROJ}.zero_1"), (WEIGHTS, "model.norm.weight"), (WEIGHTS, "stray")}
    assert what(folder, WEIGHTS, f"{Q_PROJ}.zero_1") == "is missing"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("scale_0", lambda t: t[:-1], r"expected torch.float16[32]"),
        ("scale_0", lambda t: t.float(), "is torch.float32[32]"),
        ("scale_1", lambda t: t * torch.inf, "NaN or infinite"),
        ("column_types", lambda t: torch.full_like(t, 255), "channels to the groups"),
        ("column_types", lambda t: None, "is missing"),
        ("surplus", lambda t: torch.ones(1), "does not belong to this linear"),
    ],
)
def test_bad_tensors_without_checksums(folder, name, change, said):
    without_checksums(folder)
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors.pop(f"{Q_PROJ}.{name}", None))
    save_file(tensors if changed is None else tensors | {f"{Q_PROJ}.{name}": changed.contiguous()}, folder / WEIGHTS)
    assert found(folder) == {(WEIGHTS, f"{Q_PROJ}.{name}")}  # once, though k and v read these column types, too
    assert said in what(folder, WEIGHTS, f"{Q_PROJ}.{name}")


def test_bits_must_be_what_the_layouts_make(folder):
    edit_config(folder, lambda config: config["quantization_config"].update(bits_per_weight=1.0))
    assert "says 1.0 bits per weight, but its layouts make" in what(folder, "config.json")


def test_stray_weight_files(folder):
    save_file({"stray": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert found(folder) == {("adapter_model.safetensors", None), ("pytorch_model.bin", None)}


# Shards


def test_missing_shard(sharded):
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    assert found(sharded) == {(missing.name, None)}


def test_tensor_in_another_shard_than_the_index_says(sharded):
    index = json.loads((sharded / INDEX).read_text())
    tensor = f"{Q_PROJ}.weight"
    right = index["weight_map"][tensor]
    wrong = max(set(index["weight_map"].values()) - {right})
    index["weight_map"][tensor] = wrong
    (sharded / INDEX).write_text(json.dumps(index))
    assert {(right, tensor), (wrong, tensor)} <= found(sharded)
    assert what(sharded, right, tensor) == "is not in the index"
    assert "is missing" in what(sharded, wrong, tensor)


def test_index_that_leaves_a_tensor_out(sharded):
    index = json.loads((sharded / INDEX).read_text())
    file = index["weight_map"].pop("model.norm.weight")
    (sharded / INDEX).write_text(json.dumps(index))
    assert {(file, "model.norm.weight"), (INDEX, None)} <= found(sharded)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "a\\b.safetensors",
              "x\0.safetensors", "x" * 300 + ".safetensors", "none.safetensors", "weights.bin", 7, None, ["a"]]
)  # fmt: skip
def test_hostile_shard_names(sharded, shard):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    assert not verify(sharded)["ok"]


# Hostile folders


def test_paths_that_are_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path / "file", tmp_path / "file" / "below", "x" * 5000, "nul\0"):
        assert len(found(path)) == 1
    assert found(tmp_path) == {("config.json", None)}


def test_pipes_links_and_folders_in_place_of_files(folder, tmp_path):
    outside = tmp_path / "secret"
    outside.write_text('{"a": 1}')
    for name in ("tokenizer.json", "generation_config.json", "run.json", WEIGHTS):
        (folder / name).unlink()
    os.mkfifo(folder / "tokenizer.json")
    (folder / "generation_config.json").symlink_to(outside)
    (folder / "run.json").mkdir()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
    (folder / "innocent").symlink_to("/etc/hostname")
    names = {name for name, _ in found(folder)}
    assert names == {"tokenizer.json", "generation_config.json", "run.json", WEIGHTS, "innocent"}
    assert "link to a file outside" in what(folder, "generation_config.json")
    assert "not a regular file" in what(folder, "tokenizer.json")


HOSTILE_JSON = [
    b"", b"\xff\xfe\x00", b"null", b"7", b'"text"', b"[]", b"{", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000,
    b'{"quantization_config": null}', b'{"quantization_config": {"quant_method": "ptq161"}}', b'{"weight_map": 3}',
    b'{"weight_map": {}}', b'{"files": {}, "tensors": []}', b'{"files": {"../../etc/passwd": "0"}, "tensors": {}}',
    b'{"files": {"config.json": 5, "": null, "a\\u0000b": "x"}, "tensors": {"a": null, "model.norm.weight": 3}}',
]  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", CHECKSUMS, "run.json", "tokenizer.json", INDEX])
@pytest.mark.parametrize("content", HOSTILE_JSON, ids=lambda content: repr(content[:30]))
def test_hostile_json(sharded, folder, name, content):
    where = sharded if name == INDEX else folder
    (where / name).write_bytes(content)
    assert verify(where)["ok"] == (name == "run.json" and content.startswith(b"{") and content.endswith(b"}"))


@pytest.mark.parametrize(
    "value",
    [
        {"format_version": 99}, {"format_version": None}, {"layouts": None}, {"layouts": [{}]}, {"layouts": [7]},
        {"layouts": [{"rows": 10**30, "groups": []}]}, {"linears": []}, {"linears": {}}, {"linears": {"a": None}},
        {"linears": {"a": {"layout": 10**9, "columns_from": None}}},
        {"linears": {"a": {"layout": 0, "columns_from": "a"}}},
        {"layouts": [{"rows": 2**28, "groups": [
            {"width": "1bit", "cols": 2**28, "zero": False, "mean": True, "col": True}]}],
         "linears": {"a": {"layout": 0, "columns_from": None}}},
        {"layouts": [{"rows": 1, "groups": [{"width": [], "cols": 1, "zero": False, "mean": True, "col": True}]}]},
        {"layouts": [{"rows": -1, "groups": [{"width": "1bit", "cols": True, "zero": 0, "mean": 1, "col": 2}]}]},
    ],
    ids=repr,
)  # fmt: skip
def test_hostile_layouts(folder, value):
    edit_config(folder, lambda config: config["quantization_config"].update(value))
    assert not verify(folder)["ok"]


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**64 - 1) + b"{}", struct.pack("<Q", 2**40), struct.pack("<Q", 5) + b"{}", b"PK\x03\x04",
        safetensors(b"[" * 1000), safetensors(b"null"), safetensors(b"[1]"), safetensors({}), safetensors({"a": None}),
        safetensors({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 10**18]}}),
        safetensors({"a": {"dtype": "U8", "shape": [2**62, 8], "data_offsets": [0, 1]}}, b"x"),
        safetensors({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [5, 1]}}, b"x"),
        safetensors({"a": {"dtype": "U8", "shape": [1], "data_offsets": "ab"}}, b"x"),
        safetensors({"a": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 6]}}, bytes(6)),
        safetensors({f"{Q_PROJ}.weight": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, bytes(2)),
        safetensors({"model.norm.weight": {"dtype": "C64", "shape": [], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors({"model.norm.weight": {"dtype": "BOOL", "shape": [0], "data_offsets": [0, 0]}}),
    ],
    ids=lambda content: repr(content[:40]),
)  # fmt: skip
def test_hostile_weight_files(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    assert WEIGHTS in {name for name, _ in found(folder)}
    with pytest.raises(ValueError, match=WEIGHTS):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [b'{"a": 1, "a": 1}', b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": {"b": 1, "c": 2, "b": 1}}'],
)
def test_json_with_a_key_twice_or_a_number_that_is_none(folder, content):
    (folder / "run.json").write_bytes(content)
    assert "is not valid JSON" in what(folder, "run.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoConfig": "evil.Evil"}},
        {"num_hidden_layers": 10**9},
        {"attn_implementation": "stranger/kernel"},
    ],
)
def test_what_a_config_must_not_ask_for(folder, fields):
    without_checksums(folder)
    edit_config(folder, lambda config: config.update(fields))
    assert next(iter(fields)) in what(folder, "config.json")


def test_adapters_are_no_part_of_a_packed_checkpoint(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "stranger/model"}')
    assert "not part of a packed checkpoint" in what(folder, "adapter_config.json")


@pytest.mark.parametrize("tensor", ["weight", "weight_1"])
def test_padding_that_is_not_zero(folder, tensor):
    without_checksums(folder)
    tensors = load_file(folder / WEIGHTS)
    packed = tensors[f"{DOWN_PROJ}.{tensor}"]
    packed.view(-1)[-1] |= 0x80
    save_file(tensors, folder / WEIGHTS)
    assert "has padding that is not zero" in what(folder, WEIGHTS, f"{DOWN_PROJ}.{tensor}")


def test_random_damage_is_always_found(folder):
    source = random.Random(0)
    names = ["config.json", WEIGHTS, "tokenizer.json", CHECKSUMS]
    contents = {name: (folder / name).read_bytes() for name in names}
    for _ in range(100):
        name = source.choice(names)
        content = bytearray(contents[name])
        position = source.randrange(len(content))
        match source.randrange(4):
            case 0:
                del content[position:]
            case 1:
                content[position] ^= 1 << source.randrange(8)
            case 2:
                content[position:position] = source.randbytes(source.randrange(1, 9))
            case 3:
                content[:8] = source.randbytes(8)
        (folder / name).write_bytes(content)
        assert found(folder), (name, position)
        (folder / name).write_bytes(contents[name])
    assert verify(folder)["ok"]
