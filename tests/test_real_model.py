"""The real model (SmolLM2-135M): a few blocks end to end, so that a result that only looks right does not pass."""

from pathlib import Path

import pytest
import torch

import ptq161
from ptq161 import pipeline
from ptq161.data import evaluation_tokens
from ptq161.evaluate.perplexity import perplexity
from ptq161.linear import PackedLinear
from ptq161.sources import open_model

pytestmark = pytest.mark.model

SETTINGS = {"preset": "paper", "samples": 8, "seqlen": 256, "epochs": 1, "blocks": (0, 2)}


@pytest.fixture(scope="module")
def original(smollm2_gguf):
    """The model and its tokenizer; quantizing leaves its weights as they are."""
    return open_model(smollm2_gguf)


@pytest.fixture(scope="module")
def run(original, wiki_text):
    """Quantize two blocks with a small calibration set, some settings changed."""

    def quantize(out, **changes):
        source = {"model": original[0], "tokenizer": original[1], "calib": f"{wiki_text}[0:400]"}
        return pipeline.quantize(out=out, **source | SETTINGS | changes)

    return quantize


@pytest.fixture(scope="module")
def quantized(run, tmp_path_factory):
    """(result, folder)"""
    out = tmp_path_factory.mktemp("smollm2") / "out"
    return run(out), out


def test_every_block_ends_below_its_start(quantized):
    result, _ = quantized
    assert [block["index"] for block in result["blocks"]] == [0, 1]
    assert all(block["loss_last"] < block["loss_first"] for block in result["blocks"])


def test_honest_bits_stay_within_the_budget_and_use_it(quantized):
    result, _ = quantized
    assert 1.60 < result["bits_per_weight"] <= 1.61
    assert result["salient_ratio"] == pytest.approx(0.17, abs=0.005)
    assert result["dense_linears"] == 28 * 7
    assert result["quantized_weights"] == 2 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)


def test_perplexity_rises_within_bounds(quantized, original, wiki_text):
    tokens = evaluation_tokens(f"{wiki_text}[1000:1020]", original[1])
    dense = ptq161.load(quantized[1], mode="dense", dtype=torch.float32)
    before, after = (perplexity(model, tokens, 256, max_windows=4)["ppl"] for model in (original[0], dense))
    assert 10 < before < 60
    assert before < after < 20 * before


def test_packed_equals_dense(quantized, original):
    prompt = original[1]("The river rises in the mountains and", return_tensors="pt").input_ids
    settings = {"activations": "float32", "dtype": torch.float32}
    packed, dense = (ptq161.load(quantized[1], mode=mode, **settings) for mode in ("packed", "dense"))
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 14
    with torch.no_grad():
        torch.testing.assert_close(packed(prompt).logits, dense(prompt).logits, rtol=1e-3, atol=1e-3)
    answer = packed.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.equal(dense.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False))


def test_file_is_smaller_than_a_dense_one_by_what_was_quantized(quantized):
    result, out = quantized
    dense = 2 * 134_515_008  # SmolLM2-135M in bfloat16, embedding tied
    saved = 2 * result["quantized_weights"] * (1 - result["bits_per_weight"] / 16)
    assert sum(path.stat().st_size for path in Path(out).glob("*.safetensors")) == result["file_bytes"]
    assert result["file_bytes"] == pytest.approx(dense - saved, rel=0.001)


def test_plain_binarization_loses_more(quantized, run, tmp_path):
    """With no salient column and nothing learned, the same two blocks are further from the original."""
    plain = run(tmp_path / "plain", epochs=0, salient_ratio=0.0)
    for ours, theirs in zip(quantized[0]["blocks"], plain["blocks"], strict=True):
        assert ours["loss_last"] < theirs["loss_last"]


def test_mixed_widths_lose_less_than_the_papers(quantized, run, original, wiki_text, tmp_path):
    """The same two blocks from the same tokens at the same bits."""
    result = run(tmp_path / "mixed", preset="fast", allocation_samples=2)
    assert 1.60 < result["bits_per_weight"] <= 1.61
    assert all(block["loss_last"] < block["loss_first"] for block in result["blocks"])
    tokens = evaluation_tokens(f"{wiki_text}[1000:1020]", original[1])
    mixed, paper = (
        perplexity(ptq161.load(folder, mode="dense", dtype=torch.float32), tokens, 256, max_windows=4)["ppl"]
        for folder in (tmp_path / "mixed", quantized[1])
    )
    assert mixed < 0.9 * paper


def test_stories_model_quantizes_whole(stories_folder, shared_data, tmp_path):
    """stories260K: all five blocks of a trained model, from an HF folder."""
    text = shared_data / "text" / "wikitext2_train_part.txt"
    settings = {"preset": "paper", "samples": 8, "seqlen": 128, "epochs": 2, "salient_ratio": 0.2}
    result = pipeline.quantize(stories_folder, tmp_path / "out", calib=f"{text}[0:500]", **settings)
    assert len(result["blocks"]) == 5
    assert all(block["loss_last"] < block["loss_first"] for block in result["blocks"])
    assert ptq161.load(tmp_path / "out")(torch.arange(10)[None]).logits.isfinite().all()
