"""Environments of the libraries that benchmarks compare with; the project depends on none of them.

Each peer has a virtual environment of its own, made when it is first asked for, and runs in a
process of its own: two numerical libraries in one process share their threads and get in each
other's way.
"""

import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).parents[1] / ".venv-peers"


class PeerError(Exception):
    """A peer could not be installed, or its process gave up."""


def peer_python(requirement: str, folder: Path = FOLDER) -> Path:
    """Returns the Python that has the requirement, after `pip install` if nobody asked before.

    Args:
        requirement: `name==version`.
        folder: where the environments are, one per requirement.

    Raises:
        PeerError: pip failed.
    """
    home = folder / requirement.replace("==", "-")
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    complete = home / ".installed"
    if complete.exists():
        return python
    print(f"installing {requirement} into {home}", file=sys.stderr)
    venv.create(home, clear=True, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = ["no word from pip", *done.stderr.strip().splitlines()]
        raise PeerError(f"{requirement} could not be installed into {home}: {said[-1]}")
    complete.touch()
    return python
