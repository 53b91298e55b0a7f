"""A few seconds of every fuzzing target, and what longer runs have found."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, seeds

HERE = Path(__file__).parent


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_search_begins_with_passes(target: str) -> None:
    found = sorted((HERE / "inputs" / target).glob("*"))
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of what it mends
        for body in (*seeds()[target], b"", *(path.read_bytes() for path in found)):
            TARGETS[target](body)


def fuzz(keep: Path, *options: str) -> str:
    command = [sys.executable, str(HERE / "fuzz.py"), "--keep", str(keep), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(keep.iterdir())
    return done.stdout


def test_a_few_seconds_of_fuzzing_find_nothing(tmp_path: Path) -> None:
    said = fuzz(tmp_path, "--seconds", str(len(TARGETS) // 2), "--seed", "1")
    assert said.count("nothing found") == len(TARGETS)


@pytest.mark.chaos
def test_ten_minutes_of_fuzzing_find_nothing(tmp_path: Path) -> None:
    print(fuzz(tmp_path, "--seconds", "600"))
