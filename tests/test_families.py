"""Every family end to end: quantize, save, load packed and dense, generate; the file holds what was reconstructed."""

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import FAMILIES, REFUSED, VOCABULARY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import ptq161
from ptq161 import pipeline
from ptq161.binarize import reconstruct
from ptq161.errors import UnsupportedModule
from ptq161.layout import ModelLayout
from ptq161.linear import PackedLinear
from ptq161.packing import checked, unpack

SETTINGS = {"samples": 4, "seqlen": 24, "epochs": 1, "salient_ratio": 0.25, "compute": "float32"}
PROMPT = torch.randint(4, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Case:
    """One family: its source and packed folders, and the models loaded from them."""

    source: Path
    folder: Path
    original: PreTrainedModel
    packed: PreTrainedModel
    dense: PreTrainedModel


@pytest.fixture(scope="module")
def case(tmp_path_factory, model_folder, calibration_file):
    """Family and preset -> its Case, quantized once; everything that is not packed stays float32."""
    root = tmp_path_factory.mktemp("packed")

    @functools.cache
    def make(family, preset):
        source, folder = model_folder(family), root / f"{family}-{preset}"
        pipeline.quantize(source, folder, preset=preset, calib=str(calibration_file), dtype="float32", **SETTINGS)
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        return Case(
            source, folder, original, *(ptq161.load(folder, mode=m, activations="float32") for m in ("packed", "dense"))
        )

    return lambda family, preset="paper": make(family, preset)


def dense_from_file(case):
    """The original model with the weights that the packed file stands for, put together without PackedLinear."""
    model = copy.deepcopy(case.original)
    tensors = load_file(case.folder / "model.safetensors")
    layout = ModelLayout.from_dict(json.loads((case.folder / "config.json").read_text())["quantization_config"])
    for name, spec in layout.linears.items():
        parts = {part: tensors[f"{name}.{part}"] for part in spec.specs()}
        for part in spec.layout.specs().keys() - parts.keys():
            parts[part] = tensors[f"{spec.columns_from}.{part}"]
        with torch.no_grad():
            model.get_submodule(name).weight.copy_(reconstruct(unpack(checked(spec.layout, parts, name))))
    return model


@torch.no_grad()
def logits(model):
    return model(PROMPT, use_cache=False).logits


@pytest.mark.parametrize("preset", ["paper", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_model_computes_what_its_file_holds(family, preset, case):
    case = case(family, preset)
    expected = logits(dense_from_file(case))
    torch.testing.assert_close(logits(case.packed), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(case.dense), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(case.original), expected, rtol=0.05, atol=0.05), "nothing was quantized"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_model_generates_the_same_tokens_as_the_dense_one(family, case):
    case = case(family)
    # Not the fixture: some families read any tokenizer file in their own way, and OUT must do as its source does.
    tokenizer, original = (AutoTokenizer.from_pretrained(folder) for folder in (case.folder, case.source))
    prompt = tokenizer("The river finds", return_tensors="pt", add_special_tokens=False).input_ids
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    packed, dense = (model.generate(prompt, **settings) for model in (case.packed, case.dense))
    assert packed.shape == (1, prompt.shape[1] + 8)
    assert packed.equal(dense)
    assert tokenizer.decode(packed[0]) == original.decode(packed[0])
    assert tokenizer("The river finds") == original("The river finds")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_the_blocks_is_packed_and_nothing_else(family, case):
    case = case(family)
    linears = {name for name, module in case.original.named_modules() if isinstance(module, torch.nn.Linear)}
    linears -= {"lm_head", "embed_out"}
    assert {name for name, module in case.packed.named_modules() if isinstance(module, PackedLinear)} == linears
    assert not any(isinstance(module, PackedLinear) for module in case.dense.modules())
    packed, dense = case.packed.state_dict(), case.dense.state_dict()
    for name, tensor in case.original.state_dict().items():
        if name.rpartition(".")[0] not in linears or name.endswith(".bias"):
            assert packed[name].equal(tensor), name
            assert dense[name].equal(tensor), name


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_checkpoint_in_bfloat16_loads_and_generates(family, model_folder, calibration_file, tmp_path):
    out = tmp_path / "out"
    settings = SETTINGS | {"preset": "paper", "dtype": "bfloat16"}
    pipeline.quantize(model_folder(family), out, calib=str(calibration_file), **settings)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert logits(model).isfinite().all()
    assert model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (2, 18)
    dense = logits(ptq161.load(out, mode="dense", dtype=torch.float32))
    torch.testing.assert_close(logits(model).float(), dense, rtol=0.1, atol=0.1 * dense.abs().max().item())


@pytest.mark.parametrize("family", REFUSED)
def test_family_with_weights_outside_linears_is_refused_and_nothing_is_written(
    family, model_folder, calibration_file, tmp_path
):
    with pytest.raises(UnsupportedModule, match=r"nn\.Linear") as error:
        pipeline.quantize(model_folder(family), tmp_path / "out", calib=str(calibration_file), **SETTINGS)
    assert error.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_linears_of_a_single_group_have_no_column_types_to_share(ratio, model_folder, calibration_file, tmp_path):
    settings = SETTINGS | {"preset": "paper", "salient_ratio": ratio, "epochs": 0}
    pipeline.quantize(model_folder("llama"), tmp_path / "out", calib=str(calibration_file), dtype="float32", **settings)
    assert not any("column_types" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    packed, dense = (ptq161.load(tmp_path / "out", mode=m, activations="float32") for m in ("packed", "dense"))
    torch.testing.assert_close(logits(packed), logits(dense))
