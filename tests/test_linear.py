"""PackedLinear as an nn.Module: its buffers survive casts, copies and moves, and sharing column types costs nothing."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed import random_weight
from torch import nn
from torch.nn import functional

from ptq161.binarize import reconstruct
from ptq161.errors import InputError
from ptq161.layout import PackedLinearSpec
from ptq161.linear import PackedLinear
from ptq161.packing import pack, unpack

ROWS, COLS, SALIENT = 6, 11, 3


@pytest.fixture
def packed():
    return pack(random_weight(ROWS, COLS, SALIENT))


@pytest.fixture
def module(packed):
    return PackedLinear.of(packed, torch.linspace(-1, 1, ROWS))


def assert_same(one, other):
    assert one.layout == other.layout
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        assert torch.equal(tensor, other.tensors[name]), name


def sharing(packed):
    """Two linears in one module, the second reading the column types of the first."""
    pair = nn.ModuleDict({"owner": PackedLinear.of(packed)})
    pair["sharer"] = PackedLinear(PackedLinearSpec(packed.layout, columns_from="owner"))
    pair["sharer"].load_state_dict({name: t for name, t in packed.tensors.items() if name != "column_types"})
    pair["sharer"].share_columns(pair["owner"])
    return pair


def test_buffers_are_the_tensors_of_the_format(packed, module):
    names = ["weight", "scale_0", "mean_0", "col_0", "weight_1", "scale_1", "zero_1", "column_types"]
    assert [name for name, _ in module.named_buffers()] == names == list(packed.layout.specs())
    assert list(module.state_dict()) == ["bias", *names]
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    assert (module.in_features, module.out_features) == (COLS, ROWS)
    assert repr(module) == "PackedLinear(in_features=11, out_features=6, columns=(8 x 1bit, 3 x 4bit))"


def test_forward_is_the_dense_linear(packed, module):
    x = torch.randn(2, 3, COLS)
    expected = functional.linear(x, reconstruct(unpack(packed)), module.bias)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_computes_the_same(module, dtype):
    dense = module.dense(dtype)
    assert type(dense) is nn.Linear and dense.weight.dtype == dense.bias.dtype == dtype
    x = torch.randn(2, COLS, dtype=dtype)
    torch.testing.assert_close(module.to(dtype)(x), dense(x))


def test_dense_without_bias_keeps_the_mode(packed):
    dense = PackedLinear.of(packed).eval().dense(torch.float32)
    assert dense.bias is None and not dense.training
    assert torch.equal(dense.weight, reconstruct(unpack(packed)))


def test_state_dict_round_trip_through_a_file(module):
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = PackedLinear(module.spec, bias=True)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(other.packed(), module.packed())
    assert torch.equal(other.bias, module.bias)


def test_built_on_meta_and_filled(packed, module):
    empty = PackedLinear(PackedLinearSpec(packed.layout), bias=True, device="meta", dtype=torch.bfloat16)
    assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
    assert empty.bias.dtype == torch.bfloat16
    assert empty(torch.empty(2, COLS, device="meta")).shape == (2, ROWS)
    empty.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_same(empty.packed(), packed)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(dtype=torch.float32),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16().float(),
        lambda m: m.type(torch.float64),  # nn.Module.type converts integers, too
        lambda m: m.to(torch.zeros((), dtype=torch.bfloat16)),
        lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
    ],
)
def test_casting_reaches_only_the_bias(packed, module, cast):
    before = copy.deepcopy(module)
    after = cast(module)
    assert after is module
    assert_same(after.packed(), packed)
    reference = cast(nn.Linear(COLS, ROWS))
    assert after.bias.dtype == reference.bias.dtype
    x = torch.randn(2, COLS)
    torch.testing.assert_close(after(x), before(x), rtol=1e-2, atol=1e-2)


def test_casting_and_moving_at_once_keeps_dtypes(module):
    specs = module.spec.specs()
    moved = module.to("meta", torch.bfloat16)
    assert {name: (t.dtype, t.device.type) for name, t in moved.named_buffers()} == {
        name: (spec.dtype, "meta") for name, spec in specs.items()
    }
    assert (moved.bias.dtype, moved.bias.device.type) == (torch.bfloat16, "meta")


def test_deepcopy_is_independent(packed, module):
    copied = copy.deepcopy(module)
    copied.weight.zero_()
    assert_same(module.packed(), packed)


def test_shared_column_types_are_the_owners_tensor(packed):
    pair = sharing(packed)
    assert pair["sharer"].packed().tensors["column_types"] is pair["owner"].column_types
    assert_same(pair["sharer"].packed(), packed)
    assert "sharer.column_types" not in pair.state_dict()
    assert "owner.column_types" in pair.state_dict()
    assert len(list(pair.modules())) == 3  # the owner is not a submodule of the sharer
    x = torch.randn(2, COLS)
    torch.testing.assert_close(pair["sharer"](x), pair["owner"](x))


def test_sharing_survives_copies_casts_moves_and_assigned_state(packed):
    pair = copy.deepcopy(sharing(packed)).to(torch.bfloat16)
    assert pair["sharer"].packed().tensors["column_types"] is pair["owner"].column_types
    pair.load_state_dict({name: tensor.clone() for name, tensor in pair.state_dict().items()}, assign=True)
    assert pair["sharer"].packed().tensors["column_types"] is pair["owner"].column_types
    assert_same(pair["sharer"].packed(), packed)
    pair.to("meta")
    assert pair["sharer"].packed().tensors["column_types"].device.type == "meta"
    assert {t.device.type for t in pair["sharer"].packed().tensors.values()} == {"meta"}


def test_shared_but_unlinked_is_an_error(packed):
    module = PackedLinear(PackedLinearSpec(packed.layout, columns_from="owner"))
    with pytest.raises(InputError, match="needs column_types"):
        module(torch.zeros(2, COLS))


def test_gradient_reaches_the_input_and_an_adapter_below(module):
    adapter = nn.Linear(COLS, COLS)
    module(adapter(torch.randn(4, COLS))).square().sum().backward()
    assert adapter.weight.grad.abs().sum() > 0
    assert module.bias.grad.abs().sum() > 0


COMPILED = """
import torch
from packed import random_weight
from test_linear import COLS, sharing
from ptq161.packing import pack

pair = sharing(pack(random_weight(6, COLS, 3)))

def run(x):
    return pair["sharer"](torch.relu(pair["owner"](x)).repeat(1, 2)[:, :COLS])

results = []
for function in (run, torch.compile(run, fullgraph=True)):
    x = torch.linspace(-1, 1, 2 * COLS).reshape(2, COLS).requires_grad_()
    y = function(x)
    y.sum().backward()
    results.append((y.detach(), x.grad))
for got, expected in zip(*results, strict=True):
    torch.testing.assert_close(got, expected)
"""


@pytest.mark.slow
def test_compiles_whole_with_gradient():
    """In a process of its own: the type checks of the test run are Python that a compiler cannot trace."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent / "src")])
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
