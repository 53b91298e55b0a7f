"""Environments of the libraries that benchmarks compare with; the project depends on none of them.

A peer runs in processes of its own, in a virtual environment that is made when it is first asked
for.
"""

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from common import ROOT, UsageError

PEERS = ROOT / ".venv-peers"


def python_with(pins: Sequence[str], folder: Path, *, sees_project: bool = False) -> Path:
    """Returns the Python of an environment that has what is pinned, made if it is not there yet.

    Args:
        pins: `name==version` each.
        folder: Where the environment is.
        sees_project: Lets it import this environment's packages, so that both sides run the very
            same PyTorch; none of them is changed.

    Raises:
        UsageError: pip failed.
    """
    python, done = folder / "bin" / "python", folder / "installed.txt"
    made_of = "\n".join((*pins, sysconfig.get_path("purelib"), sys.version))
    if done.exists() and done.read_text(encoding="utf-8") == made_of:
        return python
    print(f"installing {' and '.join(pins)} into {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    if sees_project:
        [packages] = folder.glob("lib/python3*/site-packages")
        # After its own: what a peer needs in another version, it finds first.
        (packages / "project.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins]
    # pip says that it leaves the project's own packages alone; that is meant to be.
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise UsageError(f"the peers are not installed: {found.stderr.strip()[-500:]}")
    done.write_text(made_of, encoding="utf-8")
    return python
