"""Draws from predictions: each token as often as its chance says, and never one without a chance."""

import torch

from ptq161.draws import tokens_at


def test_a_point_takes_the_token_in_whose_share_it_lies():
    chances = torch.tensor([0.25, 0.0, 0.5, 0.25]).expand(6, 4)
    points = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, 1 - 2**-24])
    assert tokens_at(points, chances).tolist() == [0, 0, 2, 2, 3, 3]


def test_rows_need_not_add_up_to_one():
    assert tokens_at(torch.tensor([0.4, 0.6]), torch.tensor([[3.0, 3.0], [1e-3, 1e-3]])).tolist() == [0, 1]


def test_draws_follow_the_distribution_of_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    chances = (3 * torch.randn(50_000, generator=generator)).softmax(dim=0)
    points = torch.rand(4000, generator=generator)
    drawn = torch.cat([tokens_at(part, chances.expand(100, -1)) for part in points.split(100)])
    likeliest = chances.argsort(descending=True)
    for first, last in ((0, 10), (10, 100), (100, 1000), (1000, 10_000), (10_000, 50_000)):
        among = torch.isin(drawn, likeliest[first:last]).float().mean()
        expected = chances[likeliest[first:last]].sum()
        assert (among - expected).abs() < 4 * (expected / len(drawn)).sqrt()
