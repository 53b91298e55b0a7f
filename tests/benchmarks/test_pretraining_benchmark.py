"""Our sides of the pretraining benchmark; lightly is tried by the benchmark's own command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import pretraining_steps

    return pretraining_steps


def test_our_steps_train(benchmark: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 120, 120, 3), dtype=np.uint8)
    for name in ("simclr", "mae"):
        made = benchmark.method(name, 4)
        before = [p.detach().clone() for p in made.parameters()]
        batch = benchmark.views_of(name, images, made.views)
        assert batch["images"].shape == (4 * made.views, 3, 96, 96)
        benchmark.training(made, lambda made=made, batch=batch: made(batch)["loss"])()
        moved = [not (a == b).all() for a, b in zip(before, made.parameters(), strict=True)]
        assert any(moved) and all(p.grad is None for p in made.parameters())


def test_turns_are_taken_and_the_median_told(benchmark: Any) -> None:
    calls: list[str] = []
    seconds = benchmark.by_turns([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == ["a", "b"] * 4  # once to warm up
    assert len(seconds) == 2 and all(0 <= taken < 1 for taken in seconds)


def test_few_photographs_come_again(benchmark: Any, tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), (9, 8, 7)).save(tmp_path / "a.png")
    found = benchmark.pixels(tmp_path, 5)
    assert found.shape == (5, 120, 120, 3) and (found == (9, 8, 7)).all()
