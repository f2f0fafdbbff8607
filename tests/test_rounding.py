"""Native rounding of latents, and search for their scales, against the torch operations that they stand for."""

import pytest
import torch

from ptq161 import mixed
from ptq161.binarize import EIGHT_BIT, FOUR_BIT, ONE_BIT, TERNARY, nearest_level
from ptq161.kernels import cpu_kernels
from ptq161.kernels.native import array, native
from ptq161.kernels.rounding import has_rounding_kernel, rounded, rounding_gradients, searched_scales
from ptq161.mixed import _searched_scales, best_scale

pytestmark = pytest.mark.skipif(not cpu_kernels(), reason="the native extension is not built")

WIDTHS = (ONE_BIT, TERNARY, FOUR_BIT, EIGHT_BIT)
DTYPES = (torch.float32, torch.bfloat16)


def example(rows, sizes, seed=0):
    """Latents all around and beyond their levels, scales, natural places, groups."""
    draws = torch.Generator().manual_seed(seed)
    groups = list(zip(WIDTHS, sizes, strict=False))
    cols = sum(sizes)
    scale = (0.1 + torch.rand(rows, len(groups), generator=draws)).half().float()
    spread = torch.cat([torch.full((count,), 1.5 * -width.lowest) for width, count in groups])
    latent = torch.randn(rows, cols, generator=draws) * spread
    halves = (
        torch.rand(rows, cols, generator=draws) < 0.2
    )  # exactly between two levels, for a scale that is a power of two
    scale[: rows // 2] = 0.5
    latent[halves] = (2 * latent[halves]).round() / 2
    return latent, scale, torch.randperm(cols, generator=draws), groups


def by_torch(latent, scale, columns, groups, grad):
    """(dense, gradients at latents, gradients at scales), each by the formulas of latent.py."""
    dense, to_latent, to_scale = torch.empty_like(latent), torch.empty_like(latent), torch.empty_like(scale)
    first = 0
    for index, (width, count) in enumerate(groups):
        part, places, s = latent[:, first : first + count], columns[first : first + count], scale[:, index : index + 1]
        ratio = part / s
        level, upstream = nearest_level(ratio, width), grad.float()[:, places]
        dense[:, places] = level * s
        edge = -width.lowest + width.step / 2
        through = upstream if width is ONE_BIT else torch.where(ratio.abs() >= edge, 0.0, upstream)
        moved = 0.0 if width is ONE_BIT else through * ratio
        to_latent[:, first : first + count] = through
        to_scale[:, index] = (upstream * level - moved).double().sum(1).float()
        first += count
    return dense, to_latent, to_scale


@pytest.mark.parametrize("kernel", cpu_kernels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1, (1,)), (1, (1, 1, 1, 1)), (3, (7, 8, 9)), (5, (16, 17, 33, 31)), (64, (200, 300, 76)), (300, (40, 1, 90))],
)
def test_every_kernel_gives_what_torch_gives(kernel, dtype, rows, sizes):
    latent, scale, columns, groups = example(rows, sizes)
    grad = torch.randn(latent.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    dense, to_latent, to_scale = by_torch(latent, scale, columns, groups, grad)
    found = rounded(latent, scale, columns, groups, dtype, kernel=kernel)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert found.view(integers).equal(dense.to(dtype).view(integers)), "not bit for bit"
    found_latent, found_scale = rounding_gradients(grad, latent, scale, columns, groups, kernel=kernel)
    assert found_latent.equal(to_latent)
    torch.testing.assert_close(found_scale, to_scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", cpu_kernels())
def test_gradient_in_any_order_of_memory(kernel):
    latent, scale, columns, groups = example(6, (5, 9))
    grad = torch.randn(14, 6).T
    for found, expected in zip(
        rounding_gradients(grad, latent, scale, columns, groups, kernel=kernel),
        rounding_gradients(grad.contiguous(), latent, scale, columns, groups, kernel=kernel),
        strict=True,
    ):
        assert found.equal(expected)


@pytest.mark.parametrize("kernel", cpu_kernels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_not_finite_is_not_made_a_number(kernel, dtype, width):
    """So that a loss shows it. Of a latent without a size, only a sign is left at 1 bit, as with torch."""
    latent = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    scale, columns, groups = torch.tensor([[0.5]]), torch.arange(4), [(width, 4)]
    dense = rounded(latent, scale, columns, groups, dtype, kernel=kernel)
    expected = by_torch(latent, scale, columns, groups, latent)[0].to(dtype)
    torch.testing.assert_close(dense, expected, rtol=0, atol=0, equal_nan=True)
    assert dense[0, 0].isnan() == (width is not ONE_BIT)
    scale[0, 0] = float("nan")
    assert rounded(latent, scale, columns, groups, dtype, kernel=kernel).isnan().all()
    grad = torch.full((1, 4), float("nan"))
    to_latent, to_scale = rounding_gradients(grad, latent.nan_to_num(0, 0, 0), torch.ones(1, 1), columns, groups)
    assert to_latent.isnan().all() and to_scale.isnan().all()


def test_threads_change_nothing():
    latent, scale, columns, groups = example(900, (100, 60, 40))
    grad = torch.randn(latent.shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            forward = rounded(latent, scale, columns, groups, torch.float32)
            results.append((forward, *rounding_gradients(grad, latent, scale, columns, groups)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def test_what_the_kernel_does_not_take():
    latent = torch.zeros(2, 3)
    assert has_rounding_kernel(latent, torch.float32) and has_rounding_kernel(latent, torch.bfloat16)
    assert not has_rounding_kernel(latent, torch.float16)
    assert not has_rounding_kernel(latent.double(), torch.float32)
    assert not has_rounding_kernel(latent.to("meta"), torch.float32)
    assert not has_rounding_kernel(torch.zeros(2, 0), torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": torch.tensor([0, 0, 1])}, "no permutation"),
        ({"columns": torch.tensor([0, 1, 3])}, "no permutation"),
        ({"columns": torch.tensor([0, 1, -1])}, "no permutation"),
        ({"columns": torch.arange(4)}, "columns has 4 elements, expected 3"),
        ({"groups": [(2, 2, -1.0, 2.0)]}, "do not make up the columns"),
        ({"groups": [(4, 2, -1.0, 2.0)]}, "out of range"),
        ({"groups": [(3, 3, -1.0, 0.3)]}, "1 or 2 apart"),
        ({"scale": torch.ones(2, 2)}, "scale has 4 elements, expected 2"),
        ({"dense": torch.zeros(2, 4)}, "dense has 8 elements, expected 6"),
        ({"threads": 0}, "at least one thread"),
        ({"kernel": "magic"}, "no kernel magic"),
        ({"type": 2}, "float32 or bfloat16"),
    ],
)
def test_extension_refuses_what_does_not_fit(changes, message):
    given = {
        "kernel": "scalar",
        "groups": [(3, 2, -1.0, 2.0)],
        "type": 0,
        "latent": torch.zeros(2, 3),
        "scale": torch.ones(2, 1),
        "columns": torch.arange(3),
        "dense": torch.zeros(2, 3),
        "threads": 1,
    } | changes
    arrays = [array(given[name]) for name in ("latent", "scale", "columns", "dense")]
    with pytest.raises(ValueError, match=message):
        native.round_latents(
            given["kernel"], 2, 3, given["groups"], given["type"], *arrays, array(None), array(None), given["threads"]
        )


# The search for row scales


def weighted_error(part, scale, width, importance):
    return ((nearest_level(part / scale, width) * scale - part).square().double() * importance).sum(1)


@pytest.mark.parametrize("kernel", cpu_kernels())
@pytest.mark.parametrize("width", [TERNARY, FOUR_BIT, EIGHT_BIT])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 7), (5, 16), (33, 129), (300, 576)])
def test_every_kernel_finds_scales_as_good_as_those_of_torch(kernel, width, rows, cols):
    """The same ones, but where sums in another order make another candidate the best by a hair."""
    draws = torch.Generator().manual_seed(rows)
    part, squares = torch.randn(rows, cols, generator=draws), torch.rand(cols, generator=draws)
    part[0, 0] = 50.0
    importance = squares / squares.mean() + 1e-6
    multiples = torch.linspace(0.05, 2.0, 29)
    candidates = part.square().mean(1, keepdim=True).sqrt() * multiples
    found = searched_scales(part, width, importance, candidates, 2.0**-24, kernel=kernel)
    expected = _searched_scales(part, width, importance, candidates)
    errors = weighted_error(part, found, width, importance), weighted_error(part, expected, width, importance)
    torch.testing.assert_close(*errors, rtol=1e-5, atol=1e-7)
    if cols > 100:  # few weights fit several scales exactly
        assert torch.isclose(found, expected, rtol=1e-5).sum() >= 0.9 * rows


@pytest.mark.parametrize("kernel", cpu_kernels())
def test_scale_where_nothing_is_finite_is_the_first_candidate_and_never_below_the_smallest(kernel):
    part = torch.tensor([[float("nan"), 1.0], [0.0, 0.0]])
    candidates = torch.tensor([[0.25, 0.5]]).expand(2, 2)
    found = searched_scales(part, TERNARY, torch.ones(2), candidates, 2.0**-24, kernel=kernel)
    assert found.flatten().tolist() == [0.25, 2.0**-24]


def test_best_scale_uses_the_kernel(monkeypatch):
    part, squares = torch.randn(4, 30), torch.ones(30)
    monkeypatch.setattr(mixed, "_searched_scales", None)
    assert best_scale(part, TERNARY, squares).shape == (4, 1)
    with pytest.raises(TypeError):
        best_scale(part.double(), TERNARY, squares.double())  # which the kernel does not take


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": (3, 2, -1.0, 2.0)}, "not signs"),
        ({"group": (3, 3, -1.0, 0.3)}, "1 or 2 apart"),
        ({"group": (0, 3, -1.0, 1.0)}, "out of range"),
        ({"candidates": 0}, "candidates out of range"),
        ({"candidates": 3}, "candidate has 4 elements, expected 6"),
        ({"part": torch.zeros(2, 4)}, "part has 8 elements, expected 6"),
        ({"importance": torch.ones(2)}, "importance has 2 elements, expected 3"),
        ({"scale": torch.ones(3)}, "scale has 3 elements, expected 2"),
        ({"threads": 0}, "at least one thread"),
        ({"kernel": "magic"}, "no kernel magic"),
    ],
)
def test_extension_refuses_a_search_that_does_not_fit(changes, message):
    given = {
        "kernel": "scalar",
        "group": (3, 3, -1.0, 1.0),
        "candidates": 2,
        "part": torch.zeros(2, 3),
        "importance": torch.ones(3),
        "candidate": torch.ones(2, 2),
        "scale": torch.ones(2),
        "threads": 1,
    } | changes
    arrays = [array(given[name]) for name in ("part", "importance", "candidate", "scale")]
    with pytest.raises(ValueError, match=message):
        native.search_scales(given["kernel"], 2, given["group"], given["candidates"], 1e-7, *arrays, given["threads"])
