"""The stage as a user runs it, on tiny random models: what it writes, refuses, and continues."""

import json
import os
import signal
from pkgutil import resolve_name

import pytest
import torch
from together import exit_code
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("peft")

from ptq161 import restoration
from ptq161.cli import main
from ptq161.errors import InputError
from ptq161.pipeline import quantize
from ptq161.preprocess import preprocess

SETTINGS = {"steps": 4, "rank": 2, "lr": 1e-2, "seqlen": 16, "batch_size": 2, "accumulation": 1}
OPTIONS = ["--steps", "4", "--rank", "2", "--lr", "1e-2", "--seqlen", "16", "--set", "batch_size=2"]


@pytest.fixture(scope="module")
def once(tmp_path_factory, llama_folder, calibration_file):
    folder = tmp_path_factory.mktemp("once") / "packed"
    settings = {"preset": "paper", "salient_ratio": 0.2, "samples": 4, "seqlen": 16, "epochs": 1}
    quantize(llama_folder, folder, calib=str(calibration_file), **settings)
    return folder


@pytest.fixture
def run(tmp_path, llama_folder, calibration_file, once):
    def run(out=tmp_path / "out", **changes):
        keywords = {"text": [str(calibration_file)], "quantized": once, **SETTINGS, **changes}
        return preprocess(llama_folder, out, **keywords)

    return run


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def test_the_result_is_a_dense_model_that_quantizes(run, tmp_path, llama_folder, calibration_file, once):
    result = run()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert model.dtype == original.dtype
    assert getattr(model.config, "quantization_config", None) is None
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"]
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)
    assert not (tmp_path / "out.partial").exists()
    assert result["targets"] == 2 * 6 and result["tokens"] == 4 * 2 * 16
    assert set(result["concentration"]) == {"original", "quantized", "preprocessed"}
    settings = {"preset": "paper", "salient_ratio": 0.2, "samples": 4, "seqlen": 16, "epochs": 0}
    quantize(tmp_path / "out", tmp_path / "packed", calib=str(calibration_file), **settings)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["steps"] == 4 and record["timing"]["seconds"] > 0
    assert len(record["losses"]) == 4


def test_from_the_original_without_steps_to_speak_of_nothing_moves(run, tmp_path, llama_folder):
    run(start="original", steps=1, lr=1e-30)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in AutoModelForCausalLM.from_pretrained(llama_folder).state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-20)


def test_the_adapters_start_from_the_once_quantized_weights(run, tmp_path, once):
    run(steps=1, lr=1e-30)
    import ptq161

    expected = ptq161.load(once, dtype=torch.float32, mode="dense").state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in expected.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-20)


def test_the_once_quantized_model_is_not_needed_and_ppl_measures_four(
    capsys, tmp_path, monkeypatch, llama_folder, calibration_file, evaluation_file
):
    from ptq161 import config
    from ptq161.config import CalibrationConfig, Preset, QuantConfig

    small = Preset(
        QuantConfig(bits=None, salient_ratio=0.2, epochs=1), CalibrationConfig(samples=4, seqlen=16), "tests"
    )
    monkeypatch.setitem(config.PRESETS, "paper", small)
    command = ["preprocess", str(llama_folder), str(tmp_path / "out"), "--text", str(calibration_file), *OPTIONS]
    measuring = ["--ppl", str(evaluation_file), "--ppl-seqlen", "32", "--max-windows", "3"]
    drawing = ["--maps", str(tmp_path / "maps.png")]
    assert main([*command, *measuring, *drawing, "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    stages = result["perplexity"][str(evaluation_file)]
    assert list(stages) == ["original", "quantized", "preprocessed", "preprocessed_quantized"]
    assert len({found["ppl"] for found in stages.values()}) == 4
    assert all(found["windows"] == 3 and found["seqlen"] == 32 for found in stages.values())
    maps = json.loads((tmp_path / "out" / "salient_maps.json").read_text())
    assert [shown["stage"] for shown in maps[::3]] == ["original", "quantized", "preprocessed"]
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_person_sees(capsys, tmp_path, llama_folder, calibration_file, once):
    command = ["preprocess", str(llama_folder), str(tmp_path / "out"), "--text", str(calibration_file), *OPTIONS]
    assert main([*command, "--quantized", str(once)]) == 0
    shown = capsys.readouterr()
    assert "loss, first and last tenth" in shown.out and "next: ptq161 quantize" in shown.out
    assert "restore 4/4" in shown.err


@pytest.mark.parametrize("phase", ["training", "afterwards"])
def test_an_interrupted_run_continues_to_the_same_bytes(phase, run, tmp_path, monkeypatch):
    from ptq161 import restoration

    run(tmp_path / "whole")
    monkeypatch.setattr(restoration, "SECONDS_BETWEEN_SAVES", 0.0)

    def interrupt(progress):
        if phase == "training" and progress.step == 3:
            raise KeyboardInterrupt

    if phase == "afterwards":
        monkeypatch.setattr("ptq161.preprocess._save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", on_progress=interrupt)
    assert not (tmp_path / "cut").exists()
    monkeypatch.undo()
    steps = []
    run(tmp_path / "cut", on_progress=lambda progress: steps.append(progress.step))
    assert steps == ([3, 4] if phase == "training" else [])
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_other_settings_do_not_continue_a_run(run, tmp_path):
    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(on_progress=interrupt)
    with pytest.raises(InputError, match=r"preprocess\.rank: 2 -> 3.*--restart"):
        run(rank=3)
    assert run(rank=3, restart=True)["config"]["rank"] == 3


def test_ctrl_c_says_how_to_continue(capsys, monkeypatch, tmp_path, llama_folder, calibration_file, once):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ptq161.preprocess.preprocess", interrupt)
    command = ["preprocess", str(llama_folder), str(tmp_path / "out"), "--text", str(calibration_file)]
    assert main([*command, "--quantized", str(once)]) == 130
    assert capsys.readouterr().err.strip().endswith("the same command continues")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 is out of range: expected 1 or more"),
        ({"dropout": 1.0}, "dropout=1.0 is out of range: expected 0 to less than 1"),
        ({"lr": 0}, "lr=0.0 is out of range: expected more than 0"),
        ({"targets": ("query",)}, "no linear is called 'query'; expected targets among: q_proj"),
        ({"text": ["self"]}, "'self' has none"),
        ({"text": ["nowhere.txt"]}, "cannot read text from nowhere.txt"),
        ({"quantized": "nowhere"}, "nowhere is not a packed ptq161 checkpoint"),
        ({"seqlen": 10**6}, "smaller --seqlen"),
        ({"ppl": ["self"]}, "cannot be evaluated on its own samples"),
        ({"dtype": "float12"}, "unknown dtype 'float12'"),
        ({"start": "nowhere"}, "expected quantized or original"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(changes, message, run, tmp_path):
    with pytest.raises(InputError) as error:
        run(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_quantized_model_must_be_of_this_model(run, model_folder, tmp_path, calibration_file, once):
    with pytest.raises(InputError, match="is no quantized version of this model"):
        preprocess(model_folder("qwen3"), tmp_path / "o", text=[str(calibration_file)], quantized=once, **SETTINGS)


def test_without_peft_the_extra_is_named(capsys, monkeypatch, tmp_path, llama_folder, calibration_file):
    monkeypatch.setattr("ptq161.commands.common.find_spec", lambda name: None)
    assert main(["preprocess", str(llama_folder), str(tmp_path / "out"), "--text", str(calibration_file)]) == 2
    assert 'peft: pip install "ptq161[preprocess]"' in capsys.readouterr().err


def test_a_result_that_exists_is_kept(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="--overwrite"):
        run()


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_continues(run, tmp_path, llama_folder, calibration_file, once):
    run(tmp_path / "whole", steps=12)
    out = tmp_path / "killed"
    arguments = (llama_folder, out, str(calibration_file), once)
    for moment, call in MOMENTS:
        assert exit_code(preprocess_until, moment, call, *arguments) == -signal.SIGKILL and not out.exists()
    assert exit_code(preprocess_until, "torch.save", NEVER, *arguments) == 0
    assert files_of(out) == files_of(tmp_path / "whole")


# Killed when this is called for the n-th time.
MOMENTS = [
    ("ptq161.restoration.sync_folder", 4),  # with files of a checkpoint that may not be on the disk yet
    ("torch.save", 6),  # with half a checkpoint
    ("ptq161.preprocess.write_json", 1),  # with a model that lacks its record
]
NEVER = 0


def preprocess_until(moment, calls_left, model, out, text, once):
    """Preprocess, and kill this process as soon as `moment` is called for the `calls_left`-th time."""
    torch.set_num_threads(1)
    restoration.SECONDS_BETWEEN_SAVES = 0.0
    holder, name = moment.rsplit(".", 1)
    whole = resolve_name(moment)

    def killed(*arguments, **keywords):
        nonlocal calls_left
        calls_left -= 1
        if calls_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **keywords)

    setattr(resolve_name(holder), name, killed)
    preprocess(model, out, text=[text], quantized=once, **SETTINGS | {"steps": 12})
