"""bench: what it measures is there and consistent; how fast anything is, no test can say."""

import json

import pytest
import torch
from packed import write_packed

from ptq161.binarize import reconstruct
from ptq161.cli import main
from ptq161.evaluate import model_speed, speed
from ptq161.inspection import inspect
from ptq161.kernels import cpu_kernels
from ptq161.packing import problems, unpack

CONTRACT = {"decode_tok_s", "prefill_tok_s", "dense_decode_tok_s", "speedup", "weight_bytes", "gb_s"}


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr(speed, "_cache_bytes", lambda: 4096)


@pytest.mark.parametrize("format", speed.FORMATS)
@pytest.mark.parametrize("cols", [1, 7, 576])
def test_random_weights_are_sound(format, cols):
    packed = speed.random_packed(speed.random_layout(5, cols, format), torch.Generator().manual_seed(0))
    assert list(problems(packed.layout, packed.tensors)) == []
    assert packed.layout.cols == cols and reconstruct(unpack(packed)).shape == (5, cols)


def test_a_shape_is_measured(capsys):
    command = ["bench", "--shape", "40x64", "--rounds", "2", "--tokens", "1", "--tokens", "3", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= CONTRACT
    rows = {(row["weights"], row["tokens"]): row for row in result["measured"]}
    names = ["float32", "bfloat16", "packed"] + ["packed float32"] * bool(cpu_kernels())
    reads = [(speed.READ, 1)] if cpu_kernels() else []
    assert set(rows) == {(name, count) for name in names for count in (1, 3)} | set(reads)
    for (name, count), row in rows.items():
        assert row["calls"] == 2 * speed.BURST and 0 < row["p10_us"] <= row["median_us"]
        assert (row["gb_s"] is not None) == name.startswith("packed")
        if name != speed.READ:
            assert row["gflop_s"] == pytest.approx(2e-3 * 40 * 64 * count / row["p10_us"])
    assert result["decode_tok_s"] == pytest.approx(1e6 / rows["packed", 1]["p10_us"])
    assert result["prefill_tok_s"] == pytest.approx(3e6 / rows["packed", 3]["p10_us"])
    dense = min(rows["float32", 1]["p10_us"], rows["bfloat16", 1]["p10_us"])
    assert result["speedup"] == pytest.approx(dense / rows["packed", 1]["p10_us"])
    layout = speed.random_layout(40, 64, "mixed")
    assert result["weight_bytes"] == sum(spec.nbytes for spec in layout.specs().values())


def test_a_table_for_people(capsys):
    assert main(["bench", "--shape", "33x20", "--rounds", "2", "--format", "paper", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "33 x 20, paper format" in out and "1 thread," in out and "times as fast" in out


def test_a_head_is_measured(capsys):
    assert main(["bench", "--shape", "70x36", "--rounds", "2", "--format", "int8", "--tokens", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["weight_bytes"] == 70 * 36 + 2 * 70 and result["decode_tok_s"] > 0


def test_bytes_of_a_model_leave_its_head_out(tmp_path, capsys, tokenizer):
    sizes = []
    for int8_head in (False, True):
        folder = tmp_path / f"head-{int8_head}"
        write_packed(folder, "llama-tied", tokenizer=tokenizer, int8_head=int8_head)
        command = ["bench", str(folder), "--rounds", "1", "--prompt-tokens", "5", "--new-tokens", "2", "--json"]
        assert main([*command, "--dense", "float32"]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["weight_bytes"])
    assert sizes[0] == sizes[1]


def test_copies_are_as_many_bytes_together_as_asked_for():
    assert [speed._copies(nbytes, 16384) for nbytes in (1, 4096, 16384, 16385)] == [16384, 4, 1, 1]


def test_hot_weights_have_one_copy(capsys):
    command = ["bench", "--shape", "40x64", "--rounds", "1", "--tokens", "1", "--threads", "1"]
    for flags, cold in ([], True), (["--hot"], False):
        assert main([*command, *flags, "--json"]) == 0
        assert (json.loads(capsys.readouterr().out)["cold_bytes"] > 0) == cold
    assert main([*command, "--hot"]) == 0
    assert "weights hot" in capsys.readouterr().out


def test_a_model_is_measured(tmp_path, capsys, tokenizer):
    write_packed(tmp_path / "model", tokenizer=tokenizer)
    command = ["bench", str(tmp_path / "model"), "--rounds", "1", "--prompt-tokens", "5", "--new-tokens", "3"]
    command += ["--prompt-tokens", "9", "--threads", "1"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= CONTRACT
    rows = {(row["weights"], row["prompt_tokens"]): row for row in result["measured"]}
    names = ["packed", "float32", "packed, rest bfloat16", "bfloat16"]
    assert list(rows) == [(name, length) for length in (5, 9) for name in names]
    assert all(value > 0 for row in rows.values() for key, value in row.items() if key.endswith("_tok_s"))
    same_head = {"float32": "packed", "bfloat16": "packed, rest bfloat16"}
    assert result["speedups"] == {
        name: pytest.approx(rows[ours, 5]["decode_tok_s"] / rows[name, 5]["decode_tok_s"])
        for name, ours in same_head.items()
    }
    assert result["speedup"] == min(result["speedups"].values())
    assert result["load_cpu_seconds"] > 0 and result["file_bytes"] == inspect(tmp_path / "model")["file_bytes"]
    assert main([*command, "--dense", "none"]) == 0
    assert "decode tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "either a packed folder or --shape"),
        (["somewhere", "--shape", "4x4"], "either a packed folder or --shape"),
        (["--shape", "4by4"], "expected ROWSxCOLS"),
        (["--shape", "0x4"], "expected ROWSxCOLS"),
        (["--shape", "4x4", "--tokens", "0"], "tokens=0"),
        (["--shape", "4x4", "--rounds", "-1"], "rounds=-1"),
        (["--shape", "4x4", "--threads", "0"], "--threads 0"),
        (["/nowhere"], "not a packed ptq161 checkpoint"),
    ],
)
def test_bad_arguments_are_refused(arguments, what, capsys):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and what in err.splitlines()[-1]


def test_a_dense_model_that_does_not_fit_is_refused(tmp_path, monkeypatch, tokenizer):
    write_packed(tmp_path / "model", tokenizer=tokenizer)
    monkeypatch.setattr(model_speed, "available_memory_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="--dense none"):
        model_speed.bench_model(tmp_path / "model", dense=["float32"])
