"""Whitening: unit variance, no correlation, the same map on every machine."""

import pytest
import torch
from torch import Tensor

from motet.errors import DataError
from motet.selector.whitening import fit_whitening


def crooked(answers: int = 200, hidden: int = 6) -> Tensor:
    """Embeddings as language models make them: a few huge directions, and a mean far from nought."""
    return torch.randn(answers, hidden) * torch.logspace(2, -1, hidden) @ torch.randn(hidden, hidden) + 50


def test_full_whitening_gives_unit_variance_and_no_correlation() -> None:
    rows = crooked()
    white = fit_whitening(rows, torch.zeros(200, 1), 6, 0.0)(rows)
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(6), atol=1e-2, rtol=0)
    torch.testing.assert_close(white.T @ white / 200, torch.eye(6), atol=2e-2, rtol=0)


def test_shrinkage_holds_small_axes_back() -> None:
    rows = crooked()
    variances = fit_whitening(rows, torch.zeros(200, 1), 6, 0.1)(rows).var(dim=0)
    assert (variances <= 1.01).all()
    assert (variances.diff() <= 1e-3).all()  # axes come in the order of their variance
    large = fit_whitening(rows, torch.zeros(200, 1), 6, 1e6)(rows).var(dim=0)
    kept = fit_whitening(rows, torch.zeros(200, 1), 6, 0.0)
    raw = ((rows - kept.mean) @ torch.nn.functional.normalize(kept.projection, dim=0)).var(dim=0)
    torch.testing.assert_close(large / large[0], raw / raw[0], atol=1e-4, rtol=1e-2)


def test_at_most_answers_less_one_axes_are_kept() -> None:
    rows = torch.randn(10, 30)
    whitening = fit_whitening(rows, torch.zeros(10, 2), 64, 0.1)
    assert whitening.projection.shape == (30, 9)
    assert whitening(torch.randn(4, 30)).shape == (4, 9)
    assert fit_whitening(torch.randn(50, 30), torch.zeros(50, 2), 5, 0.1).projection.shape == (30, 5)
    assert fit_whitening(torch.randn(50, 30), torch.zeros(50, 2), 64, 0.1).projection.shape == (30, 30)


def test_no_dimensions_keep_the_embedding() -> None:
    rows = torch.randn(3, 5)
    whitening = fit_whitening(rows, torch.randn(3, 2), 0, 0.1)
    assert torch.equal(whitening(rows), rows)
    assert whitening.scalar_scale.tolist() == [1.0, 1.0]


def test_scalars_get_their_unit_whichever_way_round_a_pair_stands() -> None:
    scalars = torch.randn(50, 2) * torch.tensor([3.0, 0.0]) + torch.tensor([1.0, 0.0])
    signs = torch.randint(0, 2, (50, 1)) * 2.0 - 1
    scale = fit_whitening(torch.randn(50, 4), scalars, 4, 0.1).scalar_scale
    torch.testing.assert_close(scale, torch.stack([scalars[:, 0].square().mean().sqrt(), torch.tensor(1e-3)]))
    torch.testing.assert_close(fit_whitening(torch.randn(50, 4), signs * scalars, 4, 0.1).scalar_scale, scale)
    assert fit_whitening(torch.randn(50, 4), torch.zeros(0, 2), 4, 0.1).scalar_scale.tolist() == [1.0, 1.0]


def test_the_order_of_the_answers_does_not_matter() -> None:
    rows, order = crooked(), torch.randperm(200)
    one, other = (
        fit_whitening(rows, torch.zeros(200, 1), 4, 0.1),
        fit_whitening(rows[order], torch.zeros(200, 1), 4, 0.1),
    )
    torch.testing.assert_close(one.projection, other.projection, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.mean, other.mean)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_axes_along_which_nothing_varies_are_left_out(shrinkage: float) -> None:
    rows = torch.randn(3, 12).repeat(5, 1)
    whitening = fit_whitening(rows, torch.zeros(15, 1), 12, shrinkage)
    assert whitening.projection.shape == (12, 2)
    assert whitening(rows).abs().max() < 10


def test_too_few_public_answers() -> None:
    with pytest.raises(DataError) as error:
        fit_whitening(torch.randn(7, 4), torch.zeros(7, 1), 4, 0.1)
    assert str(error.value) == (
        "whitening needs at least 8 public answers, got 7; raise public_share, give more data, or set whitening=0"
    )


def test_public_answers_that_are_all_the_same() -> None:
    for rows in (torch.ones(10, 12), torch.randn(12).expand(10, 12).contiguous(), torch.zeros(10, 12)):
        with pytest.raises(DataError) as error:
            fit_whitening(rows, torch.zeros(10, 1), 4, 0.1)
        assert str(error.value) == (
            "whitening needs public answers that differ, got 10 with one embedding; give more data, or set whitening=0"
        )
