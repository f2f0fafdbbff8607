"""The GPU kernels against float64 arithmetic on the dense weight: on a GPU where there is one, else interpreted.

What an interpreter cannot tell is asked of the compiler (it needs no GPU) and of tests marked `gpu`.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed import random_groups, write_packed
from test_cpu import error, expected_of
from torch.nn import functional

from ptq161.binarize import reconstruct
from ptq161.errors import InputError
from ptq161.kernels import has_tiled_kernel, tile
from ptq161.kernels.tiled import as_integers
from ptq161.linear import PackedLinear
from ptq161.packing import pack, unpack

pytest.importorskip("triton", reason='Triton is not installed: pip install ".[triton]"')
from ptq161.kernels import gpu

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
gpu_only = pytest.mark.gpu

# rows, then columns per width; "paper" groups have zero, mean and col, the others only a row scale
SHAPES = [
    (1, {"1bit": 1}, False),
    (1, {"4bit": 1}, True),
    (17, {"ternary": 1}, False),
    (6, {"1bit": 8, "4bit": 3}, True),
    (33, {"1bit": 127, "ternary": 129, "4bit": 7}, False),
    (12, {"1bit": 33, "ternary": 17, "4bit": 9}, True),
    (20, {"4bit": 640}, False),  # more than the warps take at once
    (9, {"ternary": 1100}, False),
    (3, {"1bit": 2100}, True),
]
# float32 goes to the tensor cores in three bfloat16 parts; otherwise y is rounded once, and u where there is a col.
LIMIT = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
TOKENS = (1, 2, 3, 8, 11)


def weight_of(shape):
    rows, sizes, paper = shape
    return pack(random_groups(rows, sizes, paper=paper))


def on_device(tiled):
    def move(tensor):
        return None if tensor is None else tensor.to(DEVICE)

    return replace(tiled, tiles=move(tiled.tiles), order=move(tiled.order), col=move(tiled.col))


def check_product(shape, dtype, tokens, launch=None):
    packed = weight_of(shape)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, packed.layout.cols, generator=generator).to(dtype)
    bias = torch.randn(packed.layout.rows, generator=generator).to(dtype)
    y = gpu.multiply(x.to(DEVICE), on_device(tile(packed)), bias.to(DEVICE), launch)
    assert y.dtype == dtype and y.shape == (tokens, packed.layout.rows)
    assert error(y.cpu(), expected_of(x, packed, bias)) <= LIMIT[dtype]


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=[str(shape) for shape in SHAPES])
def test_every_shape_in_one_dtype(index):
    """Dtype and number of tokens change from shape to shape; all of them with all is the slow test below."""
    check_product(SHAPES[index], list(LIMIT)[index % 3], TOKENS[index % 5])


@pytest.mark.slow
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_dtype_and_batch(shape, dtype, tokens):
    check_product(shape, dtype, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("launch", gpu.LAUNCHES, ids=str)
def test_every_launch(launch):
    check_product(SHAPES[4], torch.bfloat16, 2, launch)
    check_product(SHAPES[3], torch.float32, 8, launch)


def test_launches_are_few_and_one_is_chosen():
    assert len(gpu.LAUNCHES) <= 8
    for rows in (1, 576, 4096, 11008):
        for tokens in (1, 8, 300):
            assert gpu.launch_for(rows, tokens) in gpu.LAUNCHES


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_is_the_reconstruction(shape, dtype):
    packed = weight_of(shape)
    expected = reconstruct(unpack(packed))
    dense = gpu.dequantize(on_device(tile(packed)), dtype).cpu()
    assert dense.dtype == dtype
    # A GPU may fuse a product and a sum; the interpreter cuts where a GPU rounds to bfloat16.
    exact = dtype == torch.float32 and not shape[2]
    torch.testing.assert_close(dense.float(), expected, rtol=0 if exact else 2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("batch", [(), (0,), (2, 0, 3), (2, 1), (5, 7)], ids=str)
def test_any_batch_shape_through_the_function_of_the_op(batch):
    """Up to TOKENS tokens by the packed weight, more by the dense one."""
    packed = weight_of(SHAPES[3])
    tiled = on_device(tile(packed))
    x = torch.randn(*batch, packed.layout.cols, generator=torch.Generator().manual_seed(1))
    y = gpu.tiled_linear(x.to(DEVICE), tiled.tiles, tiled.order, tiled.col, None, as_integers(tiled.layout), False)
    assert y.shape == (*batch, packed.layout.rows) and y.dtype == x.dtype
    torch.testing.assert_close(y.cpu(), expected_of(x, packed).float(), rtol=1e-5, atol=1e-6)


def test_codes_of_8_bits_are_multiplied_dense():
    packed = weight_of((40, {"8bit": 67}, False))
    tiled = on_device(tile(packed))
    x = torch.randn(2, 67, generator=torch.Generator().manual_seed(1))
    y = gpu.tiled_linear(x.to(DEVICE), tiled.tiles, tiled.order, tiled.col, None, as_integers(tiled.layout), False)
    torch.testing.assert_close(y.cpu(), expected_of(x, packed).float(), rtol=1e-5, atol=1e-6)
    assert not gpu.fits_mantissa(tiled.layout) and gpu.fits_mantissa(weight_of(SHAPES[5]).layout)


def test_strided_input_and_a_bias_of_another_dtype():
    packed = weight_of(SHAPES[3])
    x = torch.randn(packed.layout.cols, 2).T
    bias = torch.linspace(-1, 1, packed.layout.rows, dtype=torch.float16)
    y = gpu.multiply(x.to(DEVICE), on_device(tile(packed)), bias.to(DEVICE))
    assert error(y.cpu(), expected_of(x, packed, bias)) <= LIMIT[torch.float32]


def test_not_a_number_stays_in_its_token():
    packed = weight_of(SHAPES[3])
    x = torch.randn(3, packed.layout.cols)
    tiled = on_device(tile(packed))
    clean = gpu.multiply(x.to(DEVICE), tiled)
    x[1, 5] = float("nan")
    y = gpu.multiply(x.to(DEVICE), tiled)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[::2], clean[::2], rtol=0, atol=0)


def test_what_the_kernels_do_not_take_goes_to_the_reference():
    packed = weight_of(SHAPES[3])
    tiled = on_device(tile(packed))
    layout = as_integers(tiled.layout)
    x = torch.randn(2, packed.layout.cols, dtype=torch.float64)
    assert not gpu.runs(tiled, torch.float64) and gpu.runs(tiled, torch.bfloat16)
    y = gpu.tiled_linear(x.to(DEVICE), tiled.tiles, tiled.order, tiled.col, None, layout, False)
    torch.testing.assert_close(y.cpu(), expected_of(x, packed), rtol=1e-6, atol=1e-6)
    many = pack(random_groups(3, [("1bit", 9), ("ternary", 4), ("1bit", 5), ("4bit", 3), ("1bit", 2)]))
    assert not gpu.runs(tile(many), torch.bfloat16)


def test_wrong_tensors_are_refused():
    tiled = on_device(tile(weight_of(SHAPES[3])))
    x = torch.zeros(2, tiled.layout.cols, device=DEVICE)
    for weight, wrong in [(tiled, x[:, :-1]), (tiled, x.long()), (replace(tiled, order=None), x)]:
        with pytest.raises(InputError, match="ptq161::tiled_linear"):
            gpu.multiply(wrong, weight)
    with pytest.raises(InputError, match="needs order"):
        gpu.dequantize(replace(tiled, order=None), torch.float32)


COMPILE = Path(__file__).with_name("compile_triton.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tokens", "rows", "spills"), [("bf16", 1, 32, 0), ("fp16", 8, 16, 160), ("fp32", 2, 32, 64)]
)
def test_programs_compile_for_hopper_without_a_gpu(dtype, tokens, rows, spills, tmp_path):
    """In a process without the interpreter. `spills` is the bytes of stack that a thread may use."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(COMPILE.parents[1] / "src"), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", str(COMPILE), dtype, str(tokens), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name, usage in json.loads(done.stdout).items():
        assert usage["registers"] <= 255 and usage["stack"] <= spills and usage["shared"] <= 100_000, (name, usage)


@gpu_only
def test_the_op_runs_these_kernels():
    assert has_tiled_kernel(DEVICE)
    for shape in SHAPES[3:6]:
        tiled = on_device(tile(weight_of(shape)))
        layout = as_integers(tiled.layout)
        for dtype in LIMIT:
            x = torch.randn(2, 3, tiled.layout.cols, device=DEVICE).to(dtype)
            bias = torch.randn(tiled.layout.rows, device=DEVICE).to(dtype)
            op = torch.ops.ptq161.tiled_linear.default
            assert torch.equal(
                op(x, tiled.tiles, tiled.order, tiled.col, bias, layout, True), gpu.multiply(x, tiled, bias)
            )
            torch.library.opcheck(op, (x, tiled.tiles, tiled.order, tiled.col, None, layout, False))
            torch.library.opcheck(op, (x.requires_grad_(), tiled.tiles, tiled.order, tiled.col, bias, layout, True))
        arguments = (tiled.tiles, tiled.order, tiled.col, layout)
        torch.library.opcheck(torch.ops.ptq161.tiled_dequantize.default, arguments)


@gpu_only
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_a_cuda_graph_computes_the_same(tokens):
    packed = weight_of((300, {"1bit": 200, "ternary": 410, "4bit": 30}, False))
    module = PackedLinear.of(packed).to(DEVICE).tile()
    assert module.is_tiled
    x = torch.randn(tokens, packed.layout.cols, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, module(x))


@gpu_only
def test_compiles_whole():
    code = """
import torch
from packed import random_groups
from ptq161.linear import PackedLinear
from ptq161.packing import pack
module = PackedLinear.of(pack(random_groups(48, {"1bit": 30, "ternary": 10, "4bit": 8}))).cuda().tile()
run = lambda x: module(torch.relu(module(x)))
with torch.inference_mode():
    for tokens in (1, 3):
        x = torch.linspace(-1, 1, 48 * tokens, device="cuda").reshape(tokens, 48)
        assert torch.equal(torch.compile(run, fullgraph=True)(x), run(x))
"""
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@gpu_only
def test_a_loaded_model_uses_them(tmp_path, tokenizer):
    from ptq161.hf import load

    dense = write_packed(tmp_path / "model", tokenizer=tokenizer).to(DEVICE)
    model = load(tmp_path / "model", device="cuda", dtype=torch.float32)
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert linears and all(module.is_tiled and module.tiles.device.type == "cuda" for module in linears)
    tokens = torch.arange(12, device=DEVICE).reshape(1, -1)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-3, atol=1e-3)
    moved = model.to("cpu")
    torch.testing.assert_close(moved(tokens.cpu()).logits, dense.cpu()(tokens.cpu()).logits, rtol=5e-2, atol=5e-2)


@gpu_only
def test_gradients_equal_those_of_the_dense_linear():
    packed = weight_of(SHAPES[5])
    module = PackedLinear.of(packed).to(DEVICE).tile()
    x = torch.randn(4, packed.layout.cols, device=DEVICE, requires_grad=True)
    module(x).square().sum().backward()
    weight = reconstruct(unpack(packed)).to(DEVICE)
    expected = torch.autograd.grad(functional.linear(x, weight).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
