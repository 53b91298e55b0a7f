"""`benchmarks/cider.py`: our side of it, that it notices different values, and one run of it."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import UsageError

from trainer.metrics.cider import DocumentFrequencies, score


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import cider

    return cider


def test_batches_score_as_the_whole(benchmark: Any) -> None:
    groups, corpus = benchmark.drawn(23), benchmark.drawn(40)
    candidates, references = [own[0] for own in groups], [own[1:] for own in groups]
    whole = score(references, candidates, frequencies=DocumentFrequencies.of(corpus))
    found = benchmark.our_reward(references, candidates, corpus, 5)()
    np.testing.assert_allclose(found, whole.per_image[:, 0], atol=1e-12)
    assert found.max() > 0.1


def test_sides_that_differ_are_not_timed(benchmark: Any) -> None:
    with pytest.raises(UsageError, match=r"differ by 1.0e-05"):
        benchmark.by_turns([lambda: np.zeros(2), lambda: np.array([0, 1e-5])], 1)
    assert len(benchmark.by_turns([lambda: np.zeros(2)] * 2, 3)) == 2


def test_captions_come_from_any_file(benchmark: Any, tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"image": "a.jpg", "captions": ["a dog", "a cat"]}) + "\n")
    arguments = argparse.Namespace(drawn=False, captions=path, corpus=None)
    assert benchmark.captions_of(arguments) == ([["a dog", "a cat"]], [["a dog", "a cat"]])
    path.write_text(json.dumps({"image": "a.jpg", "captions": ["a dog"]}) + "\n")
    with pytest.raises(UsageError, match="two captions or more"):
        benchmark.captions_of(arguments)


@pytest.mark.slow
def test_ours_is_equal_and_many_times_as_fast() -> None:
    command = [sys.executable, "benchmarks/cider.py", "--tiny", "--rounds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rewards, corpus = map(float, re.findall(r"([\d.]+)x \|$", done.stdout, re.M))
    assert rewards > 15 and corpus > 2, done.stdout
