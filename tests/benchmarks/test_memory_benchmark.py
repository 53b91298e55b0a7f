"""`benchmarks/memory.py`: phases in a table, and a slope that is one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from memory import Memory, memory_of, slope


def test_the_slope_is_of_least_squares() -> None:
    assert slope([(0, 1), (10, 6), (20, 11)]) == pytest.approx(0.5)
    assert slope([(0, 0), (1, 3), (2, 0), (3, 3)]) == pytest.approx(0.6)
    assert slope([(100, 7), (200, 7)]) == 0


HOLDER = """
import subprocess, sys
held = []
for line in sys.stdin:
    if line.startswith("child"):
        child = "held = b'x' * 30_000_000; print(flush=True); input()"
        held.append(subprocess.Popen([sys.executable, "-c", child], stdin=-1, stdout=-1))
        held[-1].stdout.readline()
    elif line.startswith("hold"):
        held.append(b"x" * 50_000_000)
    print(flush=True)
held[-1].communicate(b"\\n")
"""


def test_memory_is_in_megabytes_and_counts_children() -> None:
    # In a process of its own: this one's allocators and forks may hold as much again.
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:

        def held_after(word: str) -> Memory:
            assert holder.stdin is not None and holder.stdout is not None
            print(word, file=holder.stdin, flush=True)
            assert holder.stdout.readline() == "\n"
            return memory_of(holder.pid)

        before = held_after("nothing")
        assert before.rss >= before.pss > 0
        grown = held_after("hold")
        assert grown.rss - before.rss == pytest.approx(50, abs=2)
        assert 30 < held_after("child").rss - grown.rss < 60
        holder.communicate()
    assert holder.returncode == 0


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/memory.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_phase_stands_in_the_table(bundle: Path, images: Path) -> None:
    done = benchmark(
        *("--bundle", str(bundle), "--images", str(images), "--requests", "200", "--starts", "2")
    )
    assert done.returncode == 0, done.stderr
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line[:1] == "|"]
    head, _, *rows = table
    shapes = ["1 client", "8 clients", "32 clients", "32 clients, mixed"]
    assert [row[0] for row in rows] == [
        *("ready", "the first 40", *shapes, *shapes),
        "the same, on and on",
    ]
    assert rows[-1][1] == "200"
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        assert float(cells["RSS MB"]) > float(cells["PSS MB"]) > 10
        assert cells["errors"] == "0"
    assert re.search(r"to ready: \d+\.\d\d s, the median of 2 starts", done.stdout)
    assert re.search(r"slope of the last phase: [+-]\d+\.\d\d MB of RSS per 1,000", done.stdout)


def test_what_is_missing_is_named(bundle: Path) -> None:
    done = benchmark("--bundle", str(bundle))
    assert (done.returncode, done.stderr) == (
        1,
        "error: name a folder of photographs with --images\n",
    )
    done = benchmark("--bundle", str(bundle), "--requests", "9")
    assert done.returncode == 1 and done.stderr.startswith("error: --requests must be 40 or more")
