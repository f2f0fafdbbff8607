"""The figure of salient maps: a panel for every linear and stage, one scale per linear."""

import pytest

pytest.importorskip("matplotlib")

from ptq161.report.maps import maps_figure

MAPS = [
    {"linear": linear, "stage": stage, "shape": [4, 6], "counts": [[highest, 0], [0, 1]]}
    for linear, highest in (("a.q_proj", 3), ("a.down_proj", 7))
    for stage in ("original", "quantized", "preprocessed")
]


def test_every_linear_and_stage_has_a_panel():
    figure = maps_figure(MAPS, 7.0)
    panels = figure.axes
    assert [axes.get_title("left") for axes in panels] == ["original", "quantized", "preprocessed"] * 2
    labels = [axes.get_ylabel() for axes in panels[::3]]
    assert labels == ["a.q_proj\n6 input channels", "a.down_proj\n6 input channels"]
    assert [axes.images[0].get_clim() for axes in panels] == [(0, 3)] * 3 + [(0, 7)] * 3
    assert panels[0].images[0].get_array().tolist() == [[3, 0], [0, 1]]
