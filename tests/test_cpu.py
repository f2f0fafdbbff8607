"""The CPU kernels against float64 arithmetic on the dense weight, through every door, and with everything wrong."""

import copy
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import random_groups
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ptq161.binarize import CODE_WIDTHS, reconstruct
from ptq161.errors import InputError
from ptq161.kernels import (
    ReadyWeight,
    TileMemory,
    cpu,
    cpu_kernels,
    memory,
    native,
    tile,
    tiled_linear,
    tiled_rows,
    tiles,
    untile,
)
from ptq161.kernels.tiled import as_integers
from ptq161.layout import PackedLinearSpec
from ptq161.linear import PackedLinear
from ptq161.packing import pack, unpack

needs_native = pytest.mark.skipif(not cpu_kernels(), reason="the extension is not built")

# rows, then columns per width; "paper" groups have zero, mean and col, the others only a row scale
SHAPES = [
    (1, {"1bit": 1}, False),
    (1, {"4bit": 1}, True),
    (33, {"ternary": 1}, False),
    (6, {"1bit": 8, "4bit": 3}, True),
    (31, {"1bit": 127, "ternary": 129, "4bit": 7}, False),
    (64, {"1bit": 128, "4bit": 128}, True),
    (65, {"ternary": 640}, False),
    (100, {"1bit": 33, "ternary": 17, "4bit": 9}, True),
    (192, {"1bit": 183, "ternary": 365, "4bit": 28}, False),
    (257, {"1bit": 1025}, True),
    (70, {"8bit": 301}, False),
    (33, {"1bit": 20, "8bit": 131, "4bit": 9}, True),
]
EIGHT_BIT = SHAPES[10]
LARGE = [(4096, {"1bit": 3285, "4bit": 811}, True), (11008, {"1bit": 1264, "ternary": 2624, "4bit": 208}, False)]
LARGE += [(8192, {"8bit": 2048}, False)]
LIMIT = {"int8": 2e-2, "exact": 1e-5}


def weight_of(shape):
    rows, sizes, paper = shape
    return pack(random_groups(rows, sizes, paper=paper))


def error(result, expected):
    return float((result.double() - expected).norm() / expected.norm())


def expected_of(x, packed, bias=None):
    dense = reconstruct(unpack(packed)).double()
    return functional.linear(x.double(), dense, None if bias is None else bias.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_hold_exactly_the_stored_tensors(shape):
    packed = weight_of(shape)
    tiled = tile(packed)
    assert {name: tensor.tolist() for name, tensor in untile(tiled).tensors.items()} == {
        name: tensor.tolist() for name, tensor in packed.tensors.items()
    }
    torch.testing.assert_close(
        torch.ops.ptq161.tiled_dequantize(tiled.tiles, tiled.order, tiled.col, as_integers(packed.layout)),
        reconstruct(unpack(packed)),
        rtol=0,
        atol=0,
    )


def test_a_worked_tile():
    """One row, ternary levels -1 0 1 1 | -1: two bits each, columns 0-3 in the lowest bits of bytes 0-3."""
    group = replace(
        random_groups(1, {"ternary": 5}).groups[0],
        codes=torch.tensor([[-1, 0, 1, 1, 0]], dtype=torch.int8),
        scale=torch.tensor([[1.0]]),
    )
    tiled = tile(pack(type(random_groups(1, {"ternary": 5}))((group,))))
    assert tiled.tiles.shape == (1, 192)  # a unit of 32 rows x 4 bytes, and 32 float16 scales
    assert tiled.tiles[0, :4].tolist() == [0b0100, 1, 2, 2]
    assert tiled.tiles[0, 4:128].count_nonzero() == 0
    assert tiled.tiles[0, 128:132].tolist() == [0x00, 0x3C, 0, 0]
    assert tiled.order is None and tiled.col is None


def test_padding_stays_below_five_percent_of_the_codes():
    for shape in [(4096, {"1bit": 1264, "ternary": 2624, "4bit": 208}, False), SHAPES[8]]:
        rows, sizes, _ = shape
        bits = {"1bit": 1, "ternary": 2, "4bit": 4}
        needed = rows * (sum(bits[width] * cols for width, cols in sizes.items()) / 8 + 2 * len(sizes))
        packed = weight_of((64, *shape[1:]))
        assert tile(packed).tiles.numel() * rows / 64 <= 1.05 * needed


@needs_native
@pytest.mark.parametrize("kernel", cpu_kernels())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_equals_float64_arithmetic(shape, kernel):
    packed = weight_of(shape)
    tiled = tile(packed)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(packed.layout.rows, generator=generator)
    for tokens in (1, 2, 3, 4, 5, 7, 8, 13, 31):
        x = torch.randn(tokens, packed.layout.cols, generator=generator)
        expected = expected_of(x, packed, bias)
        for mode, limit in LIMIT.items():
            for threads in (1, 2, 3):
                y = cpu.run_kernel(x, tiled, bias, exact=mode == "exact", kernel=kernel, threads=threads)
                assert error(y, expected) <= limit, (tokens, mode, threads)


@needs_native
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_sizes_of_a_7b(shape):
    packed = weight_of(shape)
    tiled = tile(packed)
    x = torch.randn(2, packed.layout.cols, generator=torch.Generator().manual_seed(1))
    expected = expected_of(x, packed)
    for kernel in set(cpu_kernels()) - {"scalar"}:
        for mode, limit in LIMIT.items():
            for tokens in (1, 2):
                y = cpu.run_kernel(x[:tokens], tiled, None, exact=mode == "exact", kernel=kernel, threads=2)
                assert error(y, expected[:tokens]) <= limit, (kernel, mode, tokens)


@needs_native
@pytest.mark.parametrize("exact", [False, True])
def test_kernels_agree_with_the_scalar_one(exact):
    """In int8 mode all round the same way, so that only the order of float sums differs."""
    packed = weight_of(SHAPES[8])
    tiled = tile(packed)
    x = torch.randn(9, packed.layout.cols, generator=torch.Generator().manual_seed(1))
    results = [cpu.run_kernel(x, tiled, None, exact=exact, kernel=k, threads=1) for k in cpu_kernels()]
    for result in results:
        assert error(result, results[-1].double()) < 1e-6


@needs_native
@pytest.mark.parametrize("exact", [False, True])
def test_threads_do_not_change_the_result(exact):
    packed = weight_of((1000, {"1bit": 700, "ternary": 1300, "4bit": 100}, True))
    tiled = tile(packed)
    for tokens in (1, 5, 70):
        x = torch.randn(tokens, packed.layout.cols, generator=torch.Generator().manual_seed(1))
        results = [
            cpu.run_kernel(x, tiled, None, exact=exact, kernel=cpu_kernels()[0], threads=threads)
            for threads in (1, 2, 5)
        ]
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_native
def test_torchs_own_threads_are_used():
    """The second thread of a product is the one that torch has already: no pool of ours comes beside it."""
    code = """
import os, torch
from packed import random_groups
from ptq161.kernels import tile, tiled_linear
from ptq161.packing import pack
torch.set_num_threads(2)
torch.ones(1 << 22).add(1)
before = len(os.listdir("/proc/self/task"))
tiled = tile(pack(random_groups(2048, {"1bit": 4096})))
tiled_linear(torch.randn(8, 4096), tiled)
print(before, len(os.listdir("/proc/self/task")))
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted in /proc")
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split()
    assert before == after


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [(), (1,), (0,), (4,), (2, 3), (2, 0, 3)], ids=str)
def test_any_batch_shape_and_dtype_through_the_op(batch, dtype):
    packed = weight_of(SHAPES[7])
    tiled = tile(packed)
    x = torch.randn(*batch, packed.layout.cols, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.linspace(-1, 1, packed.layout.rows, dtype=dtype)
    rounding = 0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
    with torch.inference_mode():
        for exact, limit in ((True, 1e-5), (False, 2e-2)):
            y = tiled_linear(x, tiled, bias, exact=exact)
            assert y.dtype == dtype and y.shape == (*batch, packed.layout.rows)
            if y.numel():
                assert error(y, expected_of(x, packed, bias)) <= limit + rounding


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", cpu_kernels())
def test_results_are_rounded_like_torch_rounds(dtype, kernel):
    """With weights of one and a single column, y is the bias plus x: every half-way case, subnormal and overflow."""
    packed = weight_of((1, {"1bit": 1}, False))
    packed = replace(
        packed, tensors={"weight": torch.tensor([[1]], dtype=torch.uint8), "scale_0": torch.ones(1).half()}
    )
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    half_way = torch.arange(0x7000, dtype=torch.int32).to(torch.int16).view(torch.float16).float() * (1 + 2.0**-11)
    bias = torch.cat([bits.to(torch.int32).view(torch.float32), half_way, torch.tensor([0.0, -0.0, 65519.9, 65520.0])])
    rows = len(bias)
    wide = pack(random_groups(rows, {"1bit": 1}))
    y = cpu.run_kernel(torch.zeros(1, 1, dtype=dtype), tile(wide), bias, exact=True, kernel=kernel, threads=1)
    torch.testing.assert_close(y[0], bias.to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_native
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kernel", cpu_kernels())
def test_not_a_number_stays_in_its_token(kernel, exact):
    packed = weight_of(SHAPES[8])
    x = torch.randn(3, packed.layout.cols)
    clean = cpu.run_kernel(x, tile(packed), None, exact=exact, kernel=kernel, threads=1)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[1, 5] = bad
        y = cpu.run_kernel(x, tile(packed), None, exact=exact, kernel=kernel, threads=1)
        assert not y[1].isfinite().any()
        torch.testing.assert_close(y[::2], clean[::2], rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("kernel", cpu_kernels())
def test_tiny_and_huge_activations(kernel):
    packed = weight_of(SHAPES[8])
    x = torch.randn(1, packed.layout.cols)
    for factor in (0.0, 1e-44, 1e-39, 1e-20, 1e20):
        y = cpu.run_kernel(x * factor, tile(packed), None, exact=False, kernel=kernel, threads=1)
        expected = expected_of(x * factor, packed)
        assert float((y.double() - expected).norm()) <= 2e-2 * float(expected.norm()) + 1e-28


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[7], EIGHT_BIT], ids=str)
def test_opcheck(shape, dtype):
    tiled = tile(weight_of(shape))
    layout = as_integers(tiled.layout)
    x = torch.randn(2, 3, tiled.layout.cols).to(dtype)
    bias = torch.randn(tiled.layout.rows).to(dtype)
    op = torch.ops.ptq161.tiled_linear.default
    torch.library.opcheck(op, (x, tiled.tiles, tiled.order, tiled.col, None, layout, False))
    torch.library.opcheck(op, (x.requires_grad_(), tiled.tiles, tiled.order, tiled.col, bias, layout, True))
    torch.library.opcheck(torch.ops.ptq161.tiled_dequantize.default, (tiled.tiles, tiled.order, tiled.col, layout))


def test_gradients_equal_those_of_the_dense_linear():
    packed = weight_of(SHAPES[7])
    dense = reconstruct(unpack(packed))
    results = []
    for weight in (tile(packed), dense):
        x = torch.linspace(-1, 1, 2 * packed.layout.cols).reshape(2, -1).requires_grad_()
        bias = torch.zeros(packed.layout.rows, requires_grad=True)
        y = functional.linear(x, dense, bias) if weight is dense else tiled_linear(x, weight, bias, exact=True)
        y.mul(torch.arange(float(packed.layout.rows))).sum().backward()
        results.append((x.grad, bias.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_tiles_equal_the_definition(shape):
    packed = weight_of(shape)
    expected, made = tiles.tile(packed), native.tile(packed)
    assert torch.equal(made.tiles, expected.tiles)
    back = native.untile(made).tensors
    assert all(torch.equal(back[name], tensor) for name, tensor in tiles.untile(expected).tensors.items())


def test_linears_share_memory_and_nothing_else(monkeypatch):
    monkeypatch.setattr(memory, "_CHUNK", 1000)
    place, chunk = TileMemory(), 2 * 2**20
    taken = [place.take(count, nbytes) for count, nbytes in [(3, 5), (1, 64), (7, 10), (chunk, 3), (2, 6)]]
    assert all(tensor.data_ptr() % 64 == 0 and not tensor.any() for tensor in taken)
    assert taken[1].data_ptr() == taken[0].data_ptr() + 64
    for value, tensor in enumerate(taken):
        tensor.fill_(value)
    assert [tensor.unique().tolist() for tensor in taken] == [[value] for value in range(5)]
    del place
    assert taken[2].tolist() == [[2] * 10] * 7


# A weight made ready: the way around torch's dispatcher


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.functions = [*getattr(self, "functions", []), str(function)]
        return function(*args, **kwargs or {})


@needs_native
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_ready_weight_computes_what_the_op_does(dtype, exact):
    weight = tile(weight_of(SHAPES[7]))
    ready, bias = ReadyWeight(weight), torch.randn(weight.layout.rows)
    for x in (torch.randn(weight.layout.cols), torch.randn(2, 3, 2 * weight.layout.cols)[..., ::2], torch.randn(0, 59)):
        x = x.to(dtype)
        for added in (None, bias):
            expected = tiled_linear(x, weight, added, exact=exact)
            assert torch.equal(ready.linear(x, added, exact=exact), expected)


@needs_native
def test_a_ready_weight_is_seen_by_whoever_looks():
    weight = tile(weight_of(SHAPES[7]))
    ready, x = ReadyWeight(weight), torch.randn(3, weight.layout.cols)
    y = ready.linear(x, None, exact=True)
    with Seen() as seen:
        ready.linear(x, None, exact=True)
    assert seen.functions == ["ptq161.tiled_linear.default"]
    x.requires_grad_()
    assert ready.linear(x, None, exact=True).requires_grad
    with torch.no_grad():
        assert not ready.linear(x, None, exact=True).requires_grad
    bias = torch.randn(weight.layout.rows, requires_grad=True)
    assert ready.linear(x.detach(), bias, exact=True).requires_grad
    with pytest.raises(RuntimeError, match="functorch"):  # as from the op, which has no rule for it
        torch.func.grad(lambda x: ready.linear(x, None, exact=True).sum())(x.detach())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = ready.linear(mode.from_tensor(x.detach()), None, exact=True)
        assert type(fake) is not torch.Tensor and fake.shape == y.shape


@needs_native
def test_a_ready_weight_refuses_what_the_op_refuses():
    weight = tile(weight_of(SHAPES[7]))
    ready, cols = ReadyWeight(weight), weight.layout.cols
    for x in (torch.randn(3, cols + 1), torch.randn(()), torch.ones(3, cols, dtype=torch.int64)):
        with torch.no_grad(), pytest.raises(InputError, match="got x as"):
            ready.linear(x, None, exact=False)
    with torch.no_grad(), pytest.raises(InputError, match="got bias as"):
        ready.linear(torch.randn(3, cols), torch.randn(7), exact=False)
    weight.order.data = weight.order.to(torch.int16)
    with torch.no_grad(), pytest.raises(InputError, match="got order as"):
        ready.linear(torch.randn(3, cols), None, exact=False)
    with pytest.raises(InputError, match="got order as"):
        ReadyWeight(weight)


# The module


def sharing(packed):
    """Two linears in one module, the second reading the column types of the first, both tiled if that can be."""
    spec = PackedLinearSpec(packed.layout, columns_from="owner")
    owner, sharer = PackedLinear.of(packed), PackedLinear(spec, device="meta")
    sharer.load_state_dict({name: packed.tensors[name] for name in spec.specs()}, assign=True)
    sharer.share_columns(owner)
    pair = torch.nn.ModuleDict({"owner": owner, "sharer": sharer})
    sharer.tile(), owner.tile()
    return pair


@needs_native
def test_a_tiled_module_keeps_its_state_and_little_else():
    packed = weight_of((576, {"1bit": 184, "ternary": 365, "4bit": 28}, False))
    plain, pair = PackedLinear.of(packed), sharing(packed)
    assert all(module.is_tiled for module in pair.values())
    assert pair["sharer"].order is pair["owner"].order
    state, expected = pair["owner"].state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert "sharer.column_types" not in pair.state_dict() and "owner.column_types" in pair.state_dict()
    stored = sum(spec.nbytes for spec in packed.layout.specs().values())
    assert sum(buffer.nbytes for buffer in pair["owner"].buffers()) <= 1.25 * stored
    assert "activations=int8" in repr(pair["owner"])


@needs_native
def test_a_tiled_module_loads_copies_and_moves():
    shape = (40, {"1bit": 20, "ternary": 30, "4bit": 7}, True)
    packed, other = weight_of(shape), pack(random_groups(*shape[:2], paper=True, seed=9))
    pair = sharing(packed)
    pair["owner"](torch.randn(1, packed.layout.cols))  # makes the weight ready, which copies do not share
    copied = copy.deepcopy(pair)
    assert copied["sharer"].order is copied["owner"].order and copied["owner"].order is not pair["owner"].order
    x = torch.randn(3, packed.layout.cols)
    assert torch.equal(copied["sharer"](x), pair["sharer"](x))
    copied["owner"].tiles = copied["owner"].tiles.clone().zero_()
    assert not copied["owner"](x).any() and pair["owner"](x).any()
    copied = copy.deepcopy(pair)
    assert torch.equal(pair.to(torch.bfloat16)["owner"](x), copied["owner"](x))
    buffer = io.BytesIO()
    torch.save(PackedLinear.of(other).state_dict(), buffer)
    buffer.seek(0)
    pair["owner"].load_state_dict(torch.load(buffer, weights_only=True))
    assert not pair["owner"].is_tiled
    assert torch.equal(pair["owner"].tile().packed().tensors["weight"], other.tensors["weight"])
    moved = copied.to("meta")
    assert {name: tensor.device.type for name, tensor in moved.state_dict().items()} == dict.fromkeys(
        moved.state_dict(), "meta"
    )
    assert not any(module.is_tiled for module in moved.values())


@needs_native
def test_exact_is_a_property_of_the_module():
    packed = weight_of(SHAPES[8])
    module = PackedLinear.of(packed).tile()
    x = torch.randn(4, packed.layout.cols)
    rounded = error(module(x), expected_of(x, packed))
    module.exact = True
    assert 1e-3 < rounded <= 2e-2 and error(module(x), expected_of(x, packed)) <= 1e-5


COMPILED = """
import torch
from packed import random_groups
from ptq161.linear import PackedLinear
from ptq161.packing import pack
module = PackedLinear.of(pack(random_groups(48, {"1bit": 30, "ternary": 10, "4bit": 8}))).tile()
run = lambda x: module(torch.relu(module(x)))
with torch.inference_mode():
    for tokens in (1, 3):
        x = torch.linspace(-1, 1, 48 * tokens).reshape(tokens, 48)
        assert torch.equal(torch.compile(run, fullgraph=True)(x), run(x))
"""


@pytest.mark.slow
@needs_native
def test_compiles_whole():
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent / "src")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# Wrong input


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: {"x": a["x"][:, 1:]}, r"x as torch.float32\[2, 58\].*\(\.\.\., 59\)"),
        (lambda a: {"x": a["x"].long()}, "x as torch.int64"),
        (lambda a: {"x": torch.tensor(1.0)}, r"x as torch.float32\[\]"),
        (lambda a: {"x": a["x"].to("meta")}, "on meta"),
        (lambda a: {"bias": torch.zeros(101)}, "bias as"),
        (lambda a: {"tiles": a["tiles"][1:]}, "tiles as"),
        (lambda a: {"tiles": a["tiles"].to(torch.int8)}, "tiles as torch.int8"),
        (lambda a: {"tiles": torch.stack([a["tiles"], a["tiles"]], -1)[..., 0]}, "with strides"),
        (lambda a: {"order": None}, "needs order"),
        (lambda a: {"order": a["order"].long()}, "order as torch.int64"),
        (lambda a: {"order": a["order"][::2].repeat_interleave(2)[:58]}, "order as"),
        (lambda a: {"order": torch.stack([a["order"], a["order"]], -1)[..., 0]}, "with strides"),
        (lambda a: {"col": None}, "needs col"),
        (lambda a: {"col": a["col"].float()}, "col as torch.float32"),
        (lambda a: {"layout": []}, "layout"),
        (lambda a: {"layout": a["layout"][:-1]}, "layout"),
        (lambda a: {"layout": [a["layout"][0], 5, *a["layout"][2:]]}, "5 levels"),
        (lambda a: {"layout": [2**40, *a["layout"][1:]]}, "tiles as"),
        (lambda a: {"layout": [a["layout"][0], 2, 0, *a["layout"][3:]]}, "0 columns"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(change, match):
    tiled = tile(weight_of(SHAPES[7]))
    arguments = {
        "x": torch.zeros(2, 59),
        "tiles": tiled.tiles,
        "order": tiled.order,
        "col": tiled.col,
        "bias": None,
        "layout": as_integers(tiled.layout),
    }
    with pytest.raises(InputError, match=match) as raised:
        torch.ops.ptq161.tiled_linear(*(arguments | change(arguments)).values(), False)
    assert "\n" not in str(raised.value)


@needs_native
@pytest.mark.parametrize("channel", [-1, 59, 2**31 - 1])
@pytest.mark.parametrize("exact", [False, True])
def test_an_order_that_leads_outside_is_an_error(channel, exact):
    tiled = tile(weight_of(SHAPES[7]))
    order = tiled.order.clone()
    order[-1] = channel
    for tokens in (1, 40):
        with pytest.raises(ValueError, match="does not exist"):
            tiled_linear(torch.zeros(tokens, 59), replace(tiled, order=order), exact=exact)


# Looking rows up


@pytest.mark.parametrize("shape", [EIGHT_BIT, SHAPES[1], SHAPES[2], (64, {"4bit": 37}, False)], ids=str)
@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3)], ids=str)
def test_rows_of_tiles_are_the_rows_of_the_weight(shape, batch):
    packed = weight_of((*shape[:2], False))
    rows = torch.randint(packed.layout.rows, batch, generator=torch.Generator().manual_seed(0))
    found = tiled_rows(rows, tile(packed))
    assert torch.equal(found, reconstruct(unpack(packed))[rows])
    assert torch.equal(tiled_rows(rows.int(), tile(packed)), found)


def test_row_opcheck():
    tiled = tile(weight_of(EIGHT_BIT))
    rows = torch.tensor([[0, 69], [31, 32]])
    torch.library.opcheck(torch.ops.ptq161.tiled_rows.default, (rows, tiled.tiles, as_integers(tiled.layout)))


@pytest.mark.parametrize(
    ("shape", "rows", "match"),
    [
        (EIGHT_BIT, torch.tensor([3, -1]), "row -1 is out of range: there are 70"),
        (EIGHT_BIT, torch.tensor([70]), "row 70 is out of range"),
        (EIGHT_BIT, torch.tensor([2**62]), "out of range"),
        (EIGHT_BIT, torch.tensor([1.0]), "row numbers as torch.float32"),
        (EIGHT_BIT, torch.tensor([1], device="meta"), "on meta"),
        (SHAPES[3], torch.tensor([1]), "one column group"),
        (SHAPES[9], torch.tensor([1]), "one column group"),
    ],
)
def test_wrong_rows_are_refused(shape, rows, match):
    tiled = tile(weight_of(shape))
    with pytest.raises(InputError, match=match):
        torch.ops.ptq161.tiled_rows(rows, tiled.tiles, as_integers(tiled.layout))


@needs_native
def test_strided_activations_and_bias():
    packed = weight_of(SHAPES[7])
    wide = torch.randn(3, 2 * packed.layout.cols)
    bias = torch.randn(2 * packed.layout.rows)
    y = tiled_linear(wide[:, ::2], tile(packed), bias[::2], exact=True)
    assert error(y, expected_of(wide[:, ::2], packed, bias[::2])) <= 1e-5


@needs_native
@given(data=st.data())
def test_native_sizes_are_checked_again(data):
    """Addresses of real arrays with any sizes: an error, or the sizes were right."""
    tiled = tile(weight_of(SHAPES[3]))
    groups = [(1, 8, -1.0, 2.0, False, True), (4, 3, -15.0, 2.0, True, False)]
    layout = cpu.native.Layout(6, groups)
    x, y = torch.zeros(2, 11), torch.zeros(2, 6)
    right = [
        "scalar", 2, 0, (x.data_ptr(), 22), (y.data_ptr(), 12), (tiled.tiles.data_ptr(), tiled.tiles.numel()),
        (tiled.order.data_ptr(), 11), (tiled.col.data_ptr(), 11), (0, 0), 0, False, 1,
    ]  # fmt: skip
    cpu.native.linear(layout, *right)
    place = data.draw(st.integers(0, len(right) - 1))
    old = right[place]
    if isinstance(old, tuple):
        count = data.draw(st.integers(-(2**63), 2**63 - 1).filter(lambda n: n != old[1]))
        wrong = (data.draw(st.sampled_from([old[0], 0, old[0] + 1])), count)
        if old == (0, 0) and wrong[0] == 0 and count == 0:
            return
    elif isinstance(old, str):
        wrong = data.draw(st.sampled_from(["", "sse9", "SCALAR"]))
    elif isinstance(old, bool):
        wrong = data.draw(st.sampled_from([None, "yes", 2.5]))
    else:
        wrong = data.draw(st.one_of(st.integers(-(2**70), -1), st.integers(2**33, 2**70), st.text(), st.none()))
    with pytest.raises((ValueError, TypeError)):
        cpu.native.linear(layout, *right[:place], wrong, *right[place + 1 :])


@needs_native
@pytest.mark.parametrize(
    ("rows", "groups"),
    [
        (0, [(1, 8, -1.0, 2.0, False, False)]),
        (-5, [(1, 8, -1.0, 2.0, False, False)]),
        (2**29, [(1, 8, -1.0, 2.0, False, False)]),
        (2**63, [(1, 8, -1.0, 2.0, False, False)]),
        (6, []),
        (6, [(3, 8, -1.0, 2.0, False, False)]),
        (6, [(16, 8, -1.0, 2.0, False, False)]),
        (6, [(1, 0, -1.0, 2.0, False, False)]),
        (6, [(1, 2**29, -1.0, 2.0, False, False)]),
        (6, [(1, 8, -1.0, 2.0, False, False)] * 17),
        (6, [(1, 8)]),
        (6, None),
    ],
)
def test_native_layouts_are_checked(rows, groups):
    with pytest.raises((ValueError, TypeError)):
        cpu.native.Layout(rows, groups)


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        {0: 7},
        {0: -1},
        {0: 2**70},
        {1: 3},
        {1: 1},
        {1: 257},
        {2: (0, 6)},
        {2: (1, 5)},
        {3: (0, 0)},
        {3: (1, 3)},
        {4: 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["codes_to_tiles", "codes_from_tiles"])
def test_native_codes_are_checked(name, change):
    codes, tiled = torch.zeros(6, 1, dtype=torch.uint8), torch.zeros(1, 256, dtype=torch.uint8)
    layout = cpu.native.Layout(6, [(1, 8, -1.0, 2.0, False, False)])
    assert (layout.tiles, layout.tile_bytes) == (1, 192)
    right = [0, 2, (codes.data_ptr(), 6), (tiled.data_ptr(), 192), 1]
    call = getattr(cpu.native, name)
    call(layout, *right)
    with pytest.raises((ValueError, TypeError)):
        call(layout, *(change.get(place, value) for place, value in enumerate(right)))


@needs_native
@given(data=st.data())
def test_any_weight_at_all(data):
    rows = data.draw(st.integers(1, 70))
    names = data.draw(st.lists(st.sampled_from(list(CODE_WIDTHS)), min_size=1, max_size=4))
    sizes = [(name, data.draw(st.integers(1, 150))) for name in names]
    weight = random_groups(rows, sizes, paper=data.draw(st.booleans()), seed=data.draw(st.integers(0, 9)))
    packed = pack(weight)
    x = torch.randn(data.draw(st.integers(1, 14)), packed.layout.cols, generator=torch.Generator().manual_seed(0))
    kernel = data.draw(st.sampled_from(cpu_kernels()))
    tiled, expected = tile(packed), expected_of(x, packed)
    scale = x.double().norm() * reconstruct(unpack(packed)).double().norm(dim=1).max()  # sums may cancel
    for exact, limit in ((True, 1e-5), (False, 2e-2)):
        y = cpu.run_kernel(x, tiled, None, exact=exact, kernel=kernel, threads=data.draw(st.integers(1, 3)))
        assert (y.double() - expected).abs().max() <= limit * scale
