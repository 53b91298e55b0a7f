"""`benchmarks/bundles.py` times bundles side by side, and names what is wrong."""

import shutil
import subprocess
import sys
from pathlib import Path

SHIPPED = Path("exports/models/cutline-base/2")


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/bundles.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_bundles_are_timed_side_by_side(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(SHIPPED, copy)
    few = ("--images", "tests/photos", "--count", "3", "--clients", "2", "--rounds", "1")
    done = benchmark(str(SHIPPED), str(copy), *few, "--threads", "1")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
    timed = {row[1]: row[2:6] for row in rows if len(row) == 7}
    for folder in (SHIPPED, copy):
        size, beams, speed, share = timed[str(folder)]
        assert 5 < float(size) < 20 and beams == "4" and float(speed) > 0
        assert share.endswith("x")
    assert timed[str(SHIPPED)][3] == "1.00x"


def test_what_is_wrong_is_named() -> None:
    done = benchmark(str(SHIPPED), str(SHIPPED), "--images", "tests/photos")
    assert (done.returncode, done.stderr) == (1, "error: a bundle is named twice\n")
