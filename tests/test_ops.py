"""The op against float64 arithmetic on the dense weight: values, gradients, shape rule, checks."""

import pytest
import torch
from packed import random_weight
from test_binarize import random_mixed
from torch.nn import functional

from ptq161.binarize import CODE_WIDTHS, reconstruct
from ptq161.errors import InputError
from ptq161.kernels import cpu_kernels, has_fast_kernel, linear
from ptq161.kernels.ops import arguments, packed_weight
from ptq161.packing import pack, unpack

# rows, cols, salient columns, row mean: one group of either kind, one row, one column, sizes off any multiple of 8;
# or rows, cols, the sizes of the three mixed groups
MIXED = (7, 24, (9, 12, 3))
SHAPES = [
    *[(6, 11, 3, True), (1, 17, 4, True), (5, 8, 0, False), (3, 7, 7, True)],
    *[MIXED, (1, 1, 0, True), (33, 64, 13, True)],
]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def packed_of(shape):
    if shape is MIXED:
        rows, _, sizes = shape
        return pack(random_mixed(rows, sizes, seed=0))
    return pack(random_weight(*shape))


def inputs(shape, batch=(2, 3), dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(*batch, shape[1], generator=generator).to(dtype)
    return x, torch.randn(shape[0], generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_arithmetic_on_the_dense_weight(shape, dtype):
    packed = packed_of(shape)
    x, bias = inputs(shape, dtype=dtype)
    expected = functional.linear(x.double(), reconstruct(unpack(packed)).double(), bias.double())
    result = linear(x, packed, bias)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * shape[1] ** 0.5
    )


@pytest.mark.parametrize("batch", [(), (1,), (0,), (4,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_batch_shape(batch):
    shape = (6, 11, 3, True)
    packed = packed_of(shape)
    x, _ = inputs(shape, batch)
    result = linear(x, packed)
    assert result.shape == (*batch, 6)
    torch.testing.assert_close(result, functional.linear(x, reconstruct(unpack(packed))))


def test_strided_input_and_inference_mode():
    packed = packed_of((6, 11, 3, True))
    x = torch.randn(11, 4).T
    with torch.inference_mode():
        result = linear(x, packed)
    torch.testing.assert_close(result, functional.linear(x, reconstruct(unpack(packed))))


def test_result_keeps_the_inputs_dtype_under_autocast():
    packed = packed_of((6, 11, 3, True))
    x, bias = inputs((6, 11))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, packed, bias).dtype == torch.float32
        assert linear(x.bfloat16(), packed, bias).dtype == torch.bfloat16  # with a float32 bias, as autocast leaves it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_opcheck(shape, dtype):
    packed = packed_of(shape)
    x, bias = inputs(shape, dtype=dtype)
    torch.library.opcheck(torch.ops.ptq161.linear.default, (x, *arguments(packed), None))
    torch.library.opcheck(torch.ops.ptq161.linear.default, (x.requires_grad_(), *arguments(packed), bias))
    torch.library.opcheck(torch.ops.ptq161.dequantize.default, arguments(packed))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
def test_gradients_equal_those_of_the_dense_linear(batch):
    shape = (6, 11, 3, True)
    packed = packed_of(shape)
    results = []
    for weight in (packed, reconstruct(unpack(packed))):
        x, bias = (tensor.requires_grad_() for tensor in inputs(shape, batch))
        y = linear(x, weight, bias) if weight is packed else functional.linear(x, weight, bias)
        (y * torch.arange(6.0)).sum().backward()
        results.append((x.grad, bias.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_shape_rule_on_meta():
    packed = packed_of((6, 11, 3, True))
    args = [
        [None if t is None else t.to("meta") for t in arg]
        if isinstance(arg, list) and not isinstance(arg[0], int)
        else arg
        for arg in arguments(packed)
    ]
    args[0] = args[0].to("meta")
    result = torch.ops.ptq161.linear(torch.empty(2, 3, 11, dtype=torch.bfloat16, device="meta"), *args, None)
    assert (result.device.type, result.shape, result.dtype) == ("meta", (2, 3, 6), torch.bfloat16)
    dense = torch.ops.ptq161.dequantize(*args)
    assert (dense.device.type, dense.shape, dense.dtype) == ("meta", (6, 11), torch.float32)


def test_arguments_describe_the_layout():
    for shape in SHAPES:
        packed = packed_of(shape)
        assert packed_weight(*arguments(packed)).layout == packed.layout


def test_level_counts_name_the_widths_uniquely():
    assert len({width.count for width in CODE_WIDTHS.values()}) == len(CODE_WIDTHS)


def changed(packed, **replacements):
    """The op's arguments between x and bias, with some replaced by name."""
    names = ("column_types", "codes", "scales", "zeros", "means", "cols", "widths", "sizes")
    return list((dict(zip(names, arguments(packed), strict=True)) | replacements).values())


@pytest.mark.parametrize(
    ("what", "match"),
    [
        (lambda p, x: (torch.zeros(2, 12), *arguments(p), None), r"x as torch.float32\[2, 12\].*\(\.\.\., 11\)"),
        (lambda p, x: (x.long(), *arguments(p), None), "x as torch.int64"),
        (lambda p, x: (torch.tensor(1.0), *arguments(p), None), r"x as torch.float32\[\]"),
        (lambda p, x: (x, *arguments(p), torch.zeros(7)), r"bias as torch.float32\[7\].*\(6,\)"),
        (lambda p, x: (x, *arguments(p), torch.zeros(6, dtype=torch.uint8)), "bias as torch.uint8"),
        (lambda p, x: (x, *changed(p, column_types=None), None), "needs column_types"),
        (lambda p, x: (x, *changed(p, column_types=torch.zeros(1, dtype=torch.uint8)), None), "column_types as"),
        (lambda p, x: (x, *changed(p, scales=[torch.zeros(6)] * 2), None), "scale_0 as torch.float32"),
        (lambda p, x: (x, *changed(p, codes=arguments(p)[1][::-1]), None), "got weight as"),
        (lambda p, x: (x, *changed(p, widths=[2]), None), "lists of"),
        (lambda p, x: (x, *changed(p, widths=[2, 5]), None), "5 levels"),
        (lambda p, x: (x, *changed(p, sizes=[8, 4]), None), "weight_1 as|x as"),
        (lambda p, x: (x, None, [], [], [], [], [], [], [], None), "lists of"),
        (lambda p, x: (x.to("meta"), *arguments(p), None), "on meta"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(what, match):
    packed = packed_of((6, 11, 3, True))
    with pytest.raises(InputError, match=match) as error:
        torch.ops.ptq161.linear(*what(packed, torch.zeros(2, 11)))
    assert str(error.value).startswith("ptq161::linear") and "\n" not in str(error.value)


def test_one_group_has_no_use_for_column_types():
    packed = packed_of((5, 8, 0, False))
    with pytest.raises(InputError, match="no use for column_types"):
        torch.ops.ptq161.linear(
            torch.zeros(2, 8), *changed(packed, column_types=torch.zeros(1, dtype=torch.uint8)), None
        )


def test_a_device_kernel_overrides_the_reference_and_keeps_the_gradient():
    packed = packed_of((6, 11, 3, True))
    cpu = torch.device("cpu")
    assert has_fast_kernel(cpu) == bool(cpu_kernels())
    with torch.library._scoped_library("ptq161", "FRAGMENT") as library:
        library.impl("linear", lambda x, *rest: x.new_full((*x.shape[:-1], 6), 5.0), "CPU")
        assert has_fast_kernel(cpu)
        x = torch.zeros(2, 11, requires_grad=True)
        y = linear(x, packed)
        assert (y == 5).all()
        y.sum().backward()
        torch.testing.assert_close(x.grad, reconstruct(unpack(packed)).sum(0).expand(2, 11))
    assert has_fast_kernel(cpu) == bool(cpu_kernels())


@pytest.mark.gpu
def test_on_a_gpu():
    shape = (33, 64, 13, True)
    packed = packed_of(shape)
    on_gpu = type(packed)(packed.layout, {name: tensor.cuda() for name, tensor in packed.tensors.items()})
    x, bias = inputs(shape)
    x_gpu = x.cuda().requires_grad_()
    result = linear(x_gpu, on_gpu, bias.cuda())
    torch.testing.assert_close(result.cpu(), linear(x, packed, bias))
    result.sum().backward()
    assert x_gpu.grad.shape == x.shape
    with pytest.raises(InputError, match="on cpu"):
        linear(x, on_gpu)
