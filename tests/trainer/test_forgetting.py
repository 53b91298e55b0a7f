"""Agreement of two models: definitions by hand, and what must not count."""

import math

import pytest
import torch

from trainer.errors import ConfigError
from trainer.forgetting import Views, agreement, linear_cka, neighbours_kept


def features(n: int = 30, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def turned(first: torch.Tensor) -> torch.Tensor:
    turn, _ = torch.linalg.qr(features(first.shape[1], first.shape[1], seed=9))
    return 3 * first @ turn


def test_the_same_features_agree_in_all() -> None:
    same = Views(features(), features(width=4, seed=1))
    for figure in agreement(same, same, neighbours=5).values():
        assert figure.value == pytest.approx(1)


def test_neighbours_are_counted_by_hand() -> None:
    before, after = features(), features() + 0.7 * features(seed=1)
    kept = neighbours_kept(before, after, 4)

    def nearest(rows: torch.Tensor, own: int) -> set[int]:
        unit = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
        order = (unit @ unit[own]).argsort(descending=True).tolist()
        return set([place for place in order if place != own][:4])

    expected = [len(nearest(before, own) & nearest(after, own)) / 4 for own in range(30)]
    assert kept.tolist() == pytest.approx(expected)
    assert 0.2 < kept.mean() < 0.9


def test_strangers_share_neighbours_by_chance() -> None:
    kept = neighbours_kept(features(400, 20), features(400, 20, seed=5), 20)
    assert kept.mean() == pytest.approx(20 / 399, abs=0.012)


def test_cka_is_that_of_centred_kernels() -> None:
    first, second = features(), features(width=9, seed=1)
    centre = torch.eye(30).double() - 1 / 30
    k, l = (centre @ (x.double() @ x.double().T) @ centre for x in (first, second))  # noqa: E741
    hsic = (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()
    assert linear_cka(first, second) == pytest.approx(hsic.item(), rel=1e-9)
    assert linear_cka(first, turned(first) + 7) == pytest.approx(1)


def test_cosines_see_a_turn_that_neighbours_do_not() -> None:
    first = features()
    found = agreement(Views(first, first), Views(turned(first), turned(first)), neighbours=5)
    assert found["feature neighbours"].value > 0.95 and found["CKA"].value == pytest.approx(1)
    assert found["cosine"].value < 0.9
    assert found["cosine"].low < found["cosine"].value < found["cosine"].high
    assert math.isnan(found["CKA"].low)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="30 neighbours of each image asked for"):
        neighbours_kept(features(), features(), 30)
