"""`benchmarks/engine.py` runs, compares what it says it compares, and names what is missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/engine.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_both_sides_say_the_same_and_are_timed() -> None:
    done = benchmark("--tiny", "--count", "8", "--rounds", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if re.match(r"\| \d", line)
    ]
    timed = {(row[0], row[1]): row for row in rows}
    for batch in ("1", "8"):
        for side in ("this engine", "`generate`"):
            row = timed[batch, side]
            assert float(row[2]) > 0 and row[-1] == "100.0%", row
        shares = [float(cell.rstrip("%")) for cell in timed[batch, "this engine"][4:7]]
        assert sum(shares) == pytest.approx(100, abs=0.3)
    assert "1 threads a side" in done.stdout


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    done = benchmark("--run", str(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}: no training run")
