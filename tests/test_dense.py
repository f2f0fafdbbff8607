"""Weights are read when they are asked for, and what computes with them is what transformers would have loaded."""

import json

import pytest
import torch
from families import FAMILIES, VOCABULARY, build
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ptq161.dense import DenseModel, Place, StoredTensors
from ptq161.errors import InputError
from ptq161.sources import open_dense

TOKENS = torch.randint(4, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sharded(tmp_path, tokenizer):
    """Family and dtype -> folder of its tiny model in many shards."""

    def save(family, dtype=torch.bfloat16):
        folder = tmp_path / family
        build(FAMILIES[family]()).to(dtype).save_pretrained(folder, max_shard_size="20KB")
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_located_weights_are_those_that_transformers_loads(family, sharded):
    folder = sharded(family)
    dense, _ = open_dense(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert not dense.resident and all(parameter.is_meta for parameter in dense.skeleton.parameters())
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert list(dense.weights) == list(loaded.state_dict())
    whole = dense.whole()
    for name, tensor in loaded.state_dict().items():
        assert whole.state_dict()[name].equal(tensor) and dense.weights[name].dtype == tensor.dtype, name
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    assert all(buffer.equal(buffers[name]) for name, buffer in whole.named_buffers())
    assert len(list(whole.parameters())) == len(list(loaded.parameters())), "a tied weight came twice"
    assert whole.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert whole.config.to_dict() == loaded.config.to_dict()
    with torch.no_grad():
        assert whole(TOKENS).logits.equal(loaded(TOKENS).logits)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "opt", "gpt-neox"])
def test_outside_has_all_but_the_blocks_and_where_it_is_not_wanted_the_head(family, sharded):
    dense, _ = open_dense(sharded(family))
    for head in (False, True):
        real = {name for name, p in dense.outside(head=head).named_parameters(remove_duplicate=False) if not p.is_meta}
        expected = {n for n in dense.weights if not n.startswith(f"{dense.prefix}.")}
        own_head = {"lm_head.weight"} if family in ("llama", "gpt-neox") else set()
        assert real == (expected if head else expected - own_head)


def test_writing_to_a_block_does_not_write_to_the_file(sharded):
    folder = sharded("llama")
    name, before = "model.layers.1.mlp.up_proj.weight", build(FAMILIES["llama"]()).bfloat16()
    block = open_dense(folder)[0].block(1)
    assert block.mlp.up_proj.weight.equal(before.get_parameter(name))
    with torch.no_grad():
        block.mlp.up_proj.weight.zero_()
    assert open_dense(folder)[0].weights[name].equal(before.get_parameter(name))


def test_a_model_in_memory_lends_its_weights_and_stays_as_it_is():
    model = build(FAMILIES["llama-tied"]())
    dense = DenseModel.of(model)
    assert dense.resident and dense.nbytes == sum(p.nbytes for p in model.parameters())
    assert all(parameter.is_meta for parameter in dense.skeleton.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert dense.block(0).mlp.up_proj.weight.data_ptr() == model.model.layers[0].mlp.up_proj.weight.data_ptr()
    whole = dense.whole()
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    with torch.no_grad():
        assert whole(TOKENS).logits.equal(model(TOKENS).logits)


def test_tied_weights_that_differ_in_the_file_are_left_to_transformers(sharded):
    """It then does not tie them, whatever the configuration says."""
    folder = sharded("llama-tied")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    head = torch.randn(VOCABULARY, 32).bfloat16()
    save_file({"lm_head.weight": head}, folder / "head.safetensors", {"format": "pt"})
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    dense, _ = open_dense(folder)
    assert dense.resident
    assert dense.weights["lm_head.weight"].equal(head)
    assert not dense.weights["model.embed_tokens.weight"].equal(head)


def test_pickled_weights_are_read_whole(llama_folder, sharded, tokenizer):
    folder = sharded("llama", torch.float32)
    torch.save(build(FAMILIES["llama"]()).state_dict(), folder / "pytorch_model.bin")
    for path in folder.glob("*safetensors*"):
        path.unlink()
    dense, _ = open_dense(folder)
    assert dense.resident
    assert dense.weights["lm_head.weight"].equal(build(FAMILIES["llama"]()).lm_head.weight)


@pytest.mark.parametrize("damage", ["missing", "misshapen", "cut off"])
def test_damaged_shards_are_named(damage, sharded):
    folder = sharded("llama")
    shard = next(path for path in sorted(folder.glob("*.safetensors")) if "model.norm.weight" in load_file(path))
    tensors = load_file(shard)
    if damage == "cut off":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        norm = tensors.pop("model.norm.weight")
        tensors |= {"model.norm.weight": norm[:5].clone()} if damage == "misshapen" else {"something": norm}
        save_file(tensors, shard, {"format": "pt"})
        if damage == "missing":
            index = folder / "model.safetensors.index.json"
            index.write_text(index.read_text().replace("model.norm.weight", "something"))
    with pytest.raises(
        InputError, match="lacks model.norm" if damage == "missing" else "model.norm|cannot load"
    ) as error:
        open_dense(folder)
    assert "\n" not in str(error.value)


def test_stored_tensors_keep_one_file_open_and_convert(tmp_path):
    places = {}
    for number in range(3):
        path = tmp_path / f"{number}.safetensors"
        save_file({"a": torch.full((2,), float(number)), "b": torch.arange(3)}, path)
        places |= {f"a{number}": Place(path, "a", torch.float16), f"b{number}": Place(path, "b")}
    stored = StoredTensors(places)
    assert len(stored) == 6 and set(stored) == places.keys()
    for number in (2, 0, 1):
        assert stored[f"a{number}"].tolist() == [number] * 2 and stored[f"a{number}"].dtype == torch.float16
        assert stored[f"b{number}"].tolist() == [0, 1, 2]
    with pytest.raises(KeyError):
        stored["c"]


def test_buffers_in_the_checkpoint_are_read_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("factor", torch.ones(1))

    model = build(FAMILIES["llama"]())
    model.model.layers[0].extra = Scaled()
    model.model.layers[0].extra.factor.fill_(3)
    assert DenseModel.of(model).block(0).extra.factor.item() == 3
