"""Whatever ends a server, nothing of it stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVER = """
import os, subprocess, sys
from pathlib import Path
from serving.leftovers import MARK, none_left

with none_left(sys.argv[1], Path(sys.argv[2])):
    os.environ[MARK] = sys.argv[1]
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    print(child.pid, flush=True)
    sys.stdin.read()
"""


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", ["orderly", "killed"])
def test_nothing_stays_however_the_server_ends(tmp_path, end):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    other = subprocess.Popen(["sleep", "60"], env={**os.environ, "CUTLINE_CLUSTER": "another"})
    command = [sys.executable, "-c", SERVER, f"mark-{os.getpid()}-{end}", folder]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:
        child = int(server.stdout.readline())
        assert lives(child) and folder.exists()
        if end == "killed":
            server.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while lives(child) or folder.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert other.poll() is None
    other.kill()
    other.wait()
