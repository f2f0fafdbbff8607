"""The commands as a user calls them: exit codes, one-line errors, JSON on stdout and nothing else there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptq161 import arguments, cli
from ptq161.arguments import parse
from ptq161.errors import InputError, Ptq161Error
from ptq161.options import quantize_settings

SOURCE = str(Path(__file__).parents[1] / "src")
QUICK = [
    *("--preset", "paper", "--samples", "4", "--seqlen", "24", "--epochs", "1"),
    *("--salient-ratio", "0.25", "--device", "cpu"),
]


@pytest.fixture
def ptq161(capsys):
    """Run a command in this process: (exit code, stdout, lines of stderr)."""

    def run(*words):
        capsys.readouterr()
        status = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


@pytest.fixture
def refused(ptq161):
    """Run a command that must end with exit code 2 and nothing on stdout; its one line of error, without the prefix."""

    def run(*words):
        status, out, err = ptq161(*words)
        assert (status, out) == (2, ""), (status, out, err)
        assert err[-1].startswith("ptq161: error: ")
        assert sum("error" in line.lower() or "Traceback" in line for line in err) == 1, err
        return err[-1].removeprefix("ptq161: error: ")

    return run


@pytest.fixture(scope="module")
def packed(tmp_path_factory, llama_folder, calibration_file):
    """(JSON of quantize, packed folder), made by the command. Do not write into it."""
    out = tmp_path_factory.mktemp("packed") / "out"
    words = ["quantize", llama_folder, out, "--calib", calibration_file, *QUICK, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "ptq161", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
        check=True,
    )
    return json.loads(done.stdout), done.stderr.splitlines(), out


def values(*words):
    """The pipeline's keywords for these options of quantize."""
    return quantize_settings(parse(["quantize", "MODEL", "OUT", *words]))


# Parsing and settings


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_the_common_options(capsys, command):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--json", "--quiet", "--debug"))


def test_nothing_given_is_the_preset():
    assert values() == {"preset": "best"}


def test_every_option_reaches_the_pipeline():
    words = "--preset fast --bits 1.7 --calib a.txt --calib self --samples 3 --seqlen 64 --epochs 5 --seed 7"
    assert values(*words.split(), "--method", "ptq161", "--set", "row_mean=false") == {
        "preset": "fast",
        "bits": 1.7,
        "salient_ratio": None,
        "calib": ("a.txt", "self"),
        "samples": 3,
        "seqlen": 64,
        "epochs": 5,
        "seed": 7,
        "method": "ptq161",
        "row_mean": "false",
    }


def test_file_below_set_below_options(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('epochs = 1\nsamples = 2\nseqlen = 3\nsources = ["one.txt"]\nbits = 2.5\n')
    found = values("--config", str(file), "--set", "epochs=10", "--set", "samples=20", "--epochs", "100")
    assert found["epochs"] == 100
    assert (found["samples"], found["seqlen"], found["calib"], found["bits"]) == (20, 3, ("one.txt",), 2.5)


@pytest.mark.parametrize(
    ("words", "bits", "ratio"),
    [
        (["--set", "bits=2"], "2", None),
        (["--set", "bits=2", "--salient-ratio", "0.3"], None, 0.3),
        (["--set", "salient_ratio=0.3", "--bits", "2"], 2.0, None),
    ],
)
def test_bits_and_ratio_drop_each_other(words, bits, ratio):
    found = values(*words)
    assert (found["bits"], found["salient_ratio"]) == (bits, ratio)


def test_both_bits_and_ratio_on_one_layer():
    with pytest.raises(InputError, match="set exactly one of the two"):
        values("--set", "bits=2", "--set", "salient_ratio=0.3")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: COMMAND"),
        (["quantise"], "unknown command 'quantise' (did you mean 'quantize'?)"),
        (["quantize", "M"], "required: OUT"),
        (["quantize", "M", "O", "more"], "unknown argument 'more'"),
        (["quantize", "M", "O", "--sampels", "3"], "did you mean --samples?"),
        (["--json", "inspect", "M"], "options go after the command"),
        (["quantize", "M", "O", "--preset", "papr"], "unknown --preset 'papr' (did you mean 'paper'?)"),
        (["quantize", "M", "O", "--dtype", "float61"], "did you mean 'float16'?"),
        (["quantize", "M", "O", "--bits", "many"], "argument --bits: invalid float value: 'many'"),
        (["quantize", "M", "O", "--bits", "0.9"], "bits=0.9 is out of range"),
        (["quantize", "M", "O", "--bits", "nan"], "bits=nan is out of range"),
        (["quantize", "M", "O", "--salient-ratio", "1.5"], "salient_ratio=1.5 is out of range"),
        (["quantize", "M", "O", "--bits", "2", "--salient-ratio", "0.2"], "not allowed with argument --bits"),
        (["quantize", "M", "O", "--epochs", "-1"], "epochs=-1 is out of range"),
        (["quantize", "M", "O", "--samples", "0"], "samples=0 is out of range"),
        (["quantize", "M", "O", "--seqlen", "1"], "seqlen=1 is out of range"),
        (["quantize", "M", "O", "--blocks", "2:2"], "expected A:B with A < B"),
        (["quantize", "M", "O", "--blocks", "2"], "expected A:B with A < B"),
        (["quantize", "M", "O", "--set", "epochs"], "expected KEY=VALUE"),
        (["quantize", "M", "O", "--set", "epoch=4"], "unknown setting 'epoch' (did you mean 'epochs'?)"),
        (["quantize", "M", "O", "--set", "epochs=4.5"], "setting epochs='4.5': expected int"),
        (["quantize", "M", "O", "--set", "statistic=max"], "expected absmax or absmean"),
        (["quantize", "M", "O", "--config", "no.toml"], "cannot read settings file no.toml"),
        (["inspect", "M", "--bits", "9"], "bits=9.0 is out of range"),
        (["eval", "M"], "eval needs something to measure: --ppl SOURCE, --tasks NAMES, or both"),
        (["eval", "M", "--tasks", "piqa,,race"], "argument --tasks: 'piqa,,race': expected names with commas between"),
        (["eval", "M", "--ppl", "t.txt", "--out", "no/such/folder/r.jsonl"], "its folder does not exist"),
        (["generate", "M"], "required: --prompt"),
        (["serve", "M", "--port", "80000"], "argument --port: '80000': expected a port number, 0 to 65535"),
        (["serve", "M", "--port", "http"], "argument --port: 'http': expected a port number, 0 to 65535"),
        (["generate", "M", "--prompt", "x", "--mode", "dens"], "unknown --mode 'dens' (did you mean 'dense'?)"),
    ],
)
def test_mistyped_arguments(refused, words, says):
    assert says in refused(*words)


def test_mistyped_arguments_are_answered_without_torch():
    code = """
import sys
from ptq161.cli import main
calls = [[], ["--help"], ["quantize", "--help"], ["quantize", "M", "O", "--set", "epoch=4"], ["quantise"],
         ["quantize", "M", "O", "--bits", "0.9"], ["inspect", "M", "--bits", "9"]]
for words in calls:
    try:
        main(words)
    except SystemExit as end:
        assert not end.code
heavy = {"torch", "transformers", "safetensors", "numpy", "rich"} & {name.partition(".")[0] for name in sys.modules}
assert not heavy, heavy
"""
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": SOURCE}, check=True, capture_output=True
    )


def test_argument_module_knows_every_command():
    parsed = {
        parse([name, "M", *more]).command
        for name, more in {
            "quantize": ["O"],
            "preprocess": ["O", "--text", "x"],
            "compare": ["--out", "O", "--calib", "x", "--ppl", "x"],
            "report": [],
            "eval": ["--ppl", "x"],
            "inspect": [],
            "verify": [],
            "generate": ["--prompt", "x"],
            "chat": [],
            "serve": [],
            "bench": [],
        }.items()
    }
    assert parsed == cli.COMMANDS.keys()
    assert set(arguments.DTYPES) == {"auto", "float32", "bfloat16", "float16"}


# What each command gives


def test_quantize_json(packed):
    result, stderr, out = packed
    assert result.keys() >= {
        *("bits_per_weight", "paper_bits", "file_bytes", "quantized_weights", "dense_linears", "seconds"),
        *("peak_rss_bytes", "blocks", "distillation"),
    }
    assert result["distillation"] is None  # the paper's method ends with the blocks
    assert result["file_bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert [block["index"] for block in result["blocks"]] == [0, 1]
    lines = [line for line in stderr if line.startswith("block ")]
    assert len(lines) == 2  # stderr is no terminal there: one line for each block
    assert "loss" in lines[0] and "left" in lines[0] and "memory" in lines[0]
    assert not [line for line in stderr if "%|" in line or "Warning" in line], stderr


BEST = [
    *("--preset", "best", "--samples", "3", "--seqlen", "16", "--epochs", "1", "--bits", "2.6", "--device", "cpu"),
    *("--set", "distill_tokens=128"),
]


def test_quantize_json_with_distillation(ptq161, tmp_path, llama_folder, calibration_file):
    words = ["quantize", llama_folder, tmp_path / "out", "--calib", calibration_file, *BEST]
    status, out, err = ptq161(*words, "--json")
    assert status == 0, err
    done = json.loads(out)["distillation"]
    assert (done["steps"], done["tokens"], done["distinct_tokens"]) == (4, 128, 128)
    assert done.keys() >= {"held_out_first", "held_out_last", "kept", "seconds"}
    lines = [line for line in err if line.startswith("distill ")]
    assert len(lines) == 4 and all("divergence" in line for line in lines)
    assert all("left" in line for line in lines[1:])
    assert lines[-1].startswith("distill 4/4 ")


def test_quantize_for_people_with_distillation(ptq161, tmp_path, llama_folder, calibration_file, monkeypatch):
    words = ["quantize", llama_folder, tmp_path / "out", "--calib", calibration_file, *BEST]
    status, out, _ = ptq161(*words)
    assert status == 0
    assert "distillation: 4 steps, 128 tokens, " in out and "divergence on held-out samples " in out
    monkeypatch.setattr("ptq161.tuning.free_memory_bytes", lambda device: 1000)
    status, out, _ = ptq161(*words, "--overwrite")
    assert status == 0
    assert "warning: no distillation, the blocks stay as they are: it needs about " in out


@pytest.mark.parametrize("kept", [True, False])
def test_distillation_that_did_not_help_is_said(capsys, kept):
    from ptq161 import tables, terminal

    record = {"steps": 3, "tokens": 96, "held_out_first": 0.5, "held_out_last": 0.25, "kept": kept, "seconds": 1.0}
    tables._show_distillation(terminal.console(), record)
    out = capsys.readouterr().out
    assert "distillation: 3 steps, 96 tokens, 1.0 s; divergence on held-out samples 0.5000 -> 0.2500\n" in out
    assert ("warning: distillation ended no better than it began" in out) is not kept


def test_quantize_for_people(ptq161, tmp_path, llama_folder, calibration_file):
    out = tmp_path / "an out"
    words = ["quantize", llama_folder, out, "--calib", calibration_file, *QUICK]
    status, stdout, stderr = ptq161(*words, "--blocks", "1:2", "--set", "lr_scale=0", "--set", "lr_angular=0")
    assert status == 0, stderr
    source = llama_folder / "model.safetensors"
    assert f"(source: {source.stat().st_size / 1e3:.1f} kB)" in stdout
    assert "honest bits per weight" in stdout and "the paper's formula" in stdout
    # Without learning, a stored loss is the start's but for rounding: better or worse, it must be said.
    loss_row = next(line for line in stdout.splitlines() if line.startswith("│ 1 "))
    worse = "+" in loss_row or " 0.0%" in loss_row
    assert ("warning: the stored loss is not below its start in block 1" in stdout) or not worse
    assert f"next: ptq161 eval '{out}'" in stdout and f"next: ptq161 generate '{out}'" in stdout


def test_warning_names_every_block_that_got_no_better(capsys):
    from ptq161 import tables, terminal

    blocks = [
        {"index": index, "loss_first": 2.0, "loss_last": last, "seconds": 1.0}
        for index, last in enumerate([1.0, 2.0, 2.5, 1.9])
    ]
    result = {
        **{"bits_per_weight": 1.61, "paper_bits": None, "file_bytes": 5, "quantized_weights": 9, "dense_linears": 0},
        **{"salient_ratio": 0.2, "seconds": 1.0, "peak_rss_bytes": 1, "blocks": blocks},
        **{"vocabulary_bits": None, "embedding_bytes": 2, "head_bytes": 0},
        "distillation": None,
    }
    tables.show_quantized(terminal.console(), result, None, [])
    assert "warning: the stored loss is not below its start in block 1, 2\n" in capsys.readouterr().out


def test_dry_run_writes_nothing(ptq161, packed, tmp_path, llama_folder, calibration_file):
    words = ["quantize", llama_folder, tmp_path / "out", "--calib", calibration_file, *QUICK, "--dry-run"]
    status, out, err = ptq161(*words, "--json")
    assert status == 0, err
    plan = json.loads(out)
    real = packed[0]
    assert plan.keys() >= real.keys() | {"peak_memory_bytes", "disk_bytes", "flops"}
    assert plan["bits_per_weight"] == real["bits_per_weight"]
    assert plan["seconds"] is None and plan["blocks"] is None
    status, out, _ = ptq161(*words)
    assert status == 0 and "peak memory, about" in out
    assert list(tmp_path.iterdir()) == []


def test_int8_head_from_plan_to_file(ptq161, packed, tmp_path, llama_folder, calibration_file):
    words = ["quantize", llama_folder, tmp_path / "out", "--calib", calibration_file, *QUICK, "--head", "int8"]
    status, out, err = ptq161(*words, "--dry-run", "--json")
    assert status == 0, err
    plan = json.loads(out)
    assert plan["vocabulary_bits"] == 8.5 and packed[0]["vocabulary_bits"] is None
    assert plan["bits_per_weight"] == packed[0]["bits_per_weight"]
    status, out, err = ptq161(*words)
    assert status == 0 and "int8: 8.50 bits per weight, counted apart" in out, err
    status, out, _ = ptq161("inspect", tmp_path / "out")
    assert status == 0 and "embedding (int8)" in out and "head (int8)" in out
    assert ptq161("verify", tmp_path / "out")[0] == 0
    status, out, _ = ptq161("inspect", llama_folder, "--head", "int8", "--salient-ratio", "0.25", "--json")
    sizes = json.loads(out)
    assert (sizes["vocabulary_bits"], sizes["embedding_bytes"]) == (8.5, plan["embedding_bytes"])
    status, out, err = ptq161("inspect", tmp_path / "out", "--head", "int8")
    assert (status, out) == (2, "") and "is packed already" in err[-1]
    status, out, err = ptq161(*words[:-1], "int9", "--overwrite")
    assert (status, out) == (2, "") and "did you mean 'int8'" in err[-1]


def test_quiet_says_nothing_on_stderr(ptq161, tmp_path, llama_folder, calibration_file):
    words = ["quantize", llama_folder, tmp_path / "out", "--calib", calibration_file, *QUICK, "--blocks", "0:1"]
    status, out, err = ptq161(*words, "--quiet")
    assert (status, err) == (0, [])
    assert "next:" not in out


def test_inspect_json_is_what_the_files_hold(ptq161, packed):
    result, _, folder = packed
    status, out, err = ptq161("inspect", folder, "--json")
    assert (status, err) == (0, [])
    sizes = json.loads(out)
    assert sizes["file_bytes"] == result["file_bytes"]
    assert sum(sizes["parts"].values()) + sizes["other_bytes"] + sizes["header_bytes"] == sizes["file_bytes"]
    assert sizes["bits_per_weight"] == result["bits_per_weight"]


def test_inspect_for_people_quotes_the_paper(ptq161):
    config = Path(__file__).parent / "configs" / "llama-7b.json"
    status, out, _ = ptq161("inspect", config, "--salient-ratio", "0.2")
    assert status == 0
    assert "The paper's Table 13 has 1.41 GB for LLaMA-7B (rule not published)" in out
    assert f"{config} (predicted)" in out and "6,476,005,376" in out


def test_eval_json(ptq161, packed, llama_folder, evaluation_file):
    options = ["--ppl", evaluation_file, "--ppl", f"{evaluation_file}[0:40]", "--seqlen", "32", "--device", "cpu"]
    status, out, err = ptq161("eval", packed[2], *options, "--max-windows", "20", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found.keys() == {"model", "bits_per_weight", "perplexity", "tasks", "seconds", "peak_rss_bytes"}
    assert found["bits_per_weight"] == packed[0]["bits_per_weight"]
    assert found["tasks"] is None
    assert found["perplexity"].keys() == {str(evaluation_file), f"{evaluation_file}[0:40]"}
    entry = found["perplexity"][str(evaluation_file)]
    assert (entry["tokens"], entry["windows"], entry["seqlen"], entry["bos"]) == (20 * 31, 20, 32, None)
    assert sum(line.startswith(f"{evaluation_file}: window") for line in err) == 10
    status, out, _ = ptq161("eval", llama_folder, *options, "--bos", "--json")
    dense = json.loads(out)
    assert status == 0 and dense["bits_per_weight"] is None
    assert dense["perplexity"][str(evaluation_file)]["bos"] == 0


def test_eval_for_people(ptq161, packed, evaluation_file, monkeypatch):
    monkeypatch.chdir(evaluation_file.parent)
    status, out, _ = ptq161("eval", packed[2], "--ppl", "evaluation.txt[0:40]", "--seqlen", "32", "--device", "cpu")
    assert status == 0
    assert "│ evaluation.txt[0:40] │" in out  # a document range is no markup
    assert "bits per weight" in out


ROW = {
    *("schema", "model", "revision", "method", "preprocessing", "config", "calib", "bits_per_weight", "claimed_bits"),
    *("file_bytes", "perplexity", "tasks", "seconds", "peak_rss_bytes", "seed", "threads", "version", "command"),
    *("status", "reason"),
}


def test_eval_appends_rows(ptq161, packed, llama_folder, calibration_file, evaluation_file, tmp_path):
    file = tmp_path / "results.jsonl"
    for model in (llama_folder, packed[2]):
        options = ["--ppl", evaluation_file, "--seqlen", "32", "--max-windows", "2", "--device", "cpu"]
        assert ptq161("eval", model, *options, "--out", file)[0] == 0
    dense, quantized = map(json.loads, file.read_text().splitlines())
    assert dense.keys() == quantized.keys() == ROW
    assert [row["status"] for row in (dense, quantized)] == ["ok", "ok"]
    unknown = ("method", "config", "calib", "bits_per_weight", "claimed_bits", "seed", "reason")
    assert all(dense[key] is None for key in unknown)
    assert dense["file_bytes"] == (llama_folder / "model.safetensors").stat().st_size
    assert quantized["method"] == "ptq161" and quantized["config"]["epochs"] == 1 and quantized["seed"] == 0
    assert quantized["calib"] == {str(calibration_file): 4 * 24}
    assert quantized["claimed_bits"] == packed[0]["paper_bits"]
    assert quantized["file_bytes"] == packed[0]["file_bytes"]
    assert quantized["command"].startswith("ptq161 eval ") and "--max-windows 2" in quantized["command"]


def test_generate_streams_text(ptq161, packed):
    words = ["generate", packed[2], "--prompt", "The river", "--max-new-tokens", "5", "--device", "cpu"]
    status, out, err = ptq161(*words, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["prompt"] == "The river" and 1 <= found["tokens"] <= 5
    status, out, err = ptq161(*words, "--mode", "packed")
    assert status == 0
    assert out.strip() == found["text"].strip()
    assert err[-1].startswith(f"{found['tokens']} tokens in ")


def test_sampled_text_follows_the_seed(ptq161, packed):
    words = ["generate", packed[2], "--prompt", "The", "--max-new-tokens", "12", "--temperature", "2", "--json"]
    texts = [json.loads(ptq161(*words, "--seed", seed)[1])["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# Input that is no good


@pytest.fixture
def quantize_refused(refused, tmp_path, llama_folder, calibration_file):
    """`quantize` with one thing wrong: its error, once it is sure that nothing was written."""

    def run(*more, model=llama_folder, out=tmp_path / "out", calib=calibration_file):
        before = sorted(tmp_path.rglob("*"))
        line = refused("quantize", model, out, "--calib", calib, *QUICK, *more)
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


def test_missing_model(quantize_refused, tmp_path):
    assert "does not exist" in quantize_refused(model=tmp_path / "nothing" / "here")


def test_folder_that_is_no_model(quantize_refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in quantize_refused(model=tmp_path / "empty")


def test_unsupported_architecture(quantize_refused, model_folder):
    assert "Conv1D" in quantize_refused(model=model_folder("gpt2"))


def test_out_exists(quantize_refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert "--overwrite" in quantize_refused()


@pytest.mark.parametrize(("content", "says"), [(b"", "no text"), (b"too short", "--samples"), (b"\xff\xfe", "UTF-8")])
def test_calibration_text(quantize_refused, tmp_path, content, says):
    (tmp_path / "text.txt").write_bytes(content)
    assert says in quantize_refused(calib=tmp_path / "text.txt")


def test_unknown_method(quantize_refused):
    assert "unknown method 'ptq' (did you mean 'ptq161'?)" in quantize_refused("--method", "ptq")


def test_unreachable_bits(refused, tmp_path, llama_folder, calibration_file):
    words = ["quantize", llama_folder, tmp_path / "out", "--calib", calibration_file, "--samples", "4"]
    line = refused(*words, "--seqlen", "24", "--bits", "1.1")
    assert "bits=1.1 cannot be reached" in line and "lowest figure" in line
    assert list(tmp_path.iterdir()) == []


def test_blocks_out_of_range(quantize_refused):
    assert "the model has blocks 0:2" in quantize_refused("--blocks", "0:9")


def test_device_that_is_not_there(quantize_refused):
    assert "device 'cdua' cannot be used" in quantize_refused("--device", "cdua")


@pytest.fixture
def tampered(packed, tmp_path):
    """A packed folder with one byte of a tensor changed."""
    folder = tmp_path / "tampered"
    shutil.copytree(packed[2], folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return folder


@pytest.mark.parametrize("command", ["eval", "generate", "chat", "serve"])
def test_tampered_checkpoint_does_not_load(refused, tampered, evaluation_file, command):
    more = {"eval": ["--ppl", evaluation_file], "generate": ["--prompt", "The"], "serve": ["--port", "0"]}.get(
        command, []
    )
    line = refused(command, tampered, *more, "--device", "cpu")
    assert "model.safetensors" in line and "tensor model.layers" in line


def test_verify(ptq161, packed, tampered):
    status, out, err = ptq161("verify", packed[2], "--json")
    assert (status, json.loads(out), err) == (0, {"ok": True, "problems": []}, [])
    status, out, err = ptq161("verify", tampered)
    assert (status, out) == (2, "")
    assert "model.safetensors: tensor model.layers" in err[0]
    assert err[-1].startswith("ptq161: error: ")
    status, out, err = ptq161("verify", tampered, "--json")
    assert status == 2 and err[-1].startswith("ptq161: error: ")
    found = json.loads(out)
    assert not found["ok"]
    assert [problem["file"] for problem in found["problems"]] == ["model.safetensors"]


def test_evaluation_text_too_short(refused, llama_folder, evaluation_file):
    words = ["eval", llama_folder, "--ppl", f"{evaluation_file}[0:1]", "--seqlen", "100", "--device", "cpu"]
    assert "less than one window of 100" in refused(*words)


# Failing while running


def test_failure_while_running_is_one_line(ptq161, monkeypatch, packed):
    def broken(path, **_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("ptq161.inspection.inspect", broken)
    status, out, err = ptq161("inspect", packed[2], "--json")
    assert (status, out) == (1, "")
    assert err == ["ptq161: error: RuntimeError: first line second line (--debug shows where)"]
    status, out, err = ptq161("inspect", packed[2], "--debug")
    assert (status, out) == (1, "")
    assert err[0].startswith("Traceback") and err[-1] == "ptq161: error: RuntimeError: first line second line"


@pytest.mark.parametrize("kind", [RuntimeError, Ptq161Error])
def test_interruption_that_a_library_made_an_error_of(ptq161, monkeypatch, packed, kind):
    def broken(path, **_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise kind("Failed to import") from None

    monkeypatch.setattr("ptq161.inspection.inspect", broken)
    assert ptq161("inspect", packed[2]) == (130, "", ["ptq161: error: interrupted"])


def test_interrupted_and_continued(ptq161, refused, started, tmp_path, llama_folder, calibration_file):
    out = tmp_path / "out"
    words = ["quantize", llama_folder, out, "--calib", calibration_file, *QUICK, "--json"]
    endless = started(*words, "--epochs", "100000", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    limit = time.monotonic() + 120
    while not (tmp_path / "out.partial" / "job.json").exists():
        assert endless.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    endless.send_signal(signal.SIGINT)
    stdout, stderr = endless.communicate(timeout=60)
    assert (endless.returncode, stdout) == (130, ""), stderr
    expected = "ptq161: error: interrupted; finished blocks are kept, the same command continues"
    assert stderr.splitlines()[-1] == expected
    assert (tmp_path / "out.partial").is_dir() and not out.exists()
    assert "--restart" in refused(*words)  # other epochs, so not the same command
    status, stdout, _ = ptq161(*words, "--restart")
    assert status == 0
    assert [block["index"] for block in json.loads(stdout)["blocks"]] == [0, 1]
    assert not (tmp_path / "out.partial").exists()


def test_progress_on_a_terminal(monkeypatch):
    """Neither lines nor a crash: the bar is drawn by rich."""
    import io

    from ptq161 import meters
    from ptq161.walk import Progress

    class Screen(io.StringIO):
        def isatty(self):
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    meter = meters.QuantizeMeter(quiet=False)
    with meter:
        meter(Progress(2, 0, 4, "targets", 0, 1, None, 5.0))
        meter(Progress(2, 0, 4, "learn", 1, 2, 0.125, 10.0))
        meter.bar.refresh()
        meter(Progress(4, 0, 4, "distill", 4, 20, 0.8, 40.0))  # continued: steps 1 to 3 were of another run
        meter(Progress(4, 0, 4, "distill", 5, 20, 0.75, 52.0))
        meter.bar.refresh()
    drawn = screen.getvalue()
    assert "distill 5/20" in drawn and "divergence 0.75" in drawn and "180 s left" not in drawn
    assert "3:00 min left" in drawn
    assert "block 3/4 learn" in drawn and "loss 0.125" in drawn
    assert "30 s left" in drawn  # half a block of the two left took 10 s


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.26, "0.3 s"), (12.4, "12 s"), (99.9, "100 s"), (205.0, "3:25 min"), (6000.0, "1:40 h")]
)
def test_durations(seconds, text):
    from ptq161.terminal import duration

    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (78_123_456, "78.1 MB"), (1_827_406_016, "1.83 GB")])
def test_sizes(count, text):
    from ptq161.terminal import size

    assert size(count) == text
