"""The arithmetic of the skew benchmark, and one run of it."""

import re
import subprocess
import sys

import pytest
from skew import LONG, SHORT, lengths_of, padded


def test_lengths_are_skewed_and_the_same_each_time():
    lengths = lengths_of(1000)
    assert lengths == lengths_of(1000)
    long = [length for length in lengths if length >= LONG[0]]
    assert 150 < len(long) < 250
    assert set(lengths) - set(long) == set(range(SHORT[0], SHORT[1] + 1))


def test_a_static_batch_runs_to_its_longest():
    assert padded([4, 30, 5, 6, 8], 2) == [30, 30, 6, 6, 8]


@pytest.mark.slow
def test_every_way_is_timed():
    command = [sys.executable, "benchmarks/skew.py", "--tiny", "--count", "16"]
    command += ["--rounds", "1", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (8|32) \| (.*?) \| ([\d.]+) \| ([\d.]+)x \|$", done.stdout, re.M)
    assert len(rows) == 6
    assert all(float(each) > 0 and float(gain) > 0 for *_, each, gain in rows)
