"""Publishing under faults: killed at every step, a full disk at every step, many at once.

Each test drives one child interpreter, which forks for every try. Forking in the test process
itself would copy whatever threads other tests have left in it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from exports.bundle import Bundle
from exports.registry import Registry

Write = Callable[[Path], Path]

# Every call by which publishing and promoting touch the disk passes `step`, before and after.
STEPS = """
import errno, io, os, signal, sys
from pathlib import Path
from exports.bundle import Bundle
from exports.errors import RegistryError
from exports.registry import Registry

source, root = sys.argv[1:]
registry = Registry(root)

def watch(step):
    def watched(call):
        def with_steps(*args, **kwargs):
            step(call.__name__, "before", args)
            result = call(*args, **kwargs)
            step(call.__name__, "after", args)
            return result
        return with_steps
    for name in ("fsync", "mkdir", "rename", "replace", "chmod"):
        setattr(os, name, watched(getattr(os, name)))
    plain_open = io.open
    def open_with_steps(file, mode="r", *args, **kwargs):
        writes = "w" in mode
        writes and step("open", "before", (file,))
        opened = plain_open(file, mode, *args, **kwargs)
        writes and step("open", "after", (file,))
        return opened
    io.open = open_with_steps

def state():
    found = {}
    for folder in Path(root, "tiny").iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            found[folder.name] = Bundle.open(folder).digest  # raises unless it is whole
    return found, registry.aliases("tiny")

def change():
    registry.promote("tiny", registry.publish(source).version)

def fork(child):
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = child() or 0
        finally:
            os._exit(code)
    return pid
"""

KILL = (
    STEPS
    + """
registry.publish(source)
registry.promote("tiny", "1")
for kill_at in range(1000):
    versions, aliases = state()
    def child():
        seen = []
        def step(*_):
            seen.append(1)
            if len(seen) > kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        watch(step)
        change()
    _, status = os.waitpid(fork(child), 0)
    versions_after, aliases_after = state()
    assert versions.items() <= versions_after.items()
    assert len(versions_after) <= len(versions) + 1
    assert registry.resolve("tiny").version in (aliases["production"], max(versions_after, key=int))
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        print(kill_at)
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
"""
)

FULL_DISK = (
    STEPS
    + """
import resource
registry.publish(source)
registry.promote("tiny", "1")
before = state()

def refused(attempt):
    try:
        attempt()
    except RegistryError as error:
        message = str(error)
        assert "No space left" in message or "File too large" in message, message
        assert "nothing was changed" in message, message
        assert not list(Path(root).glob("*/.*")), list(Path(root).glob("*/.*"))
        return 0
    return 1

def attempts():
    yield "publish", lambda: registry.publish(source)
    registry.publish(source)
    yield "promote", lambda: registry.promote("tiny", "2")

for name, attempt in attempts():
    before = state()
    for fail_at in range(1000):
        def child():
            seen = []
            def step(call, when, args):
                # A folder that exists needs no room; nor is there a way back after the rename.
                idle = call == "mkdir" and os.path.isdir(args[0])
                idle = idle or any(earlier in ("rename", "replace") for earlier in seen)
                if when == "before" and not idle:
                    seen.append(call)
                    if len(seen) == fail_at + 1:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            watch(step)
            return refused(attempt)
        code = os.waitstatus_to_exitcode(os.waitpid(fork(child), 0)[1])
        if code == 1:  # no step is left to fail
            break
        assert code == 0, (name, fail_at, code)
        assert state() == before
    print(name, fail_at)

before = state()
def child():
    # A true half-written file: the kernel takes 1,000 bytes of it and refuses the rest.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return refused(lambda: registry.publish(source))
assert os.waitstatus_to_exitcode(os.waitpid(fork(child), 0)[1]) == 0
assert state() == before
"""
)

CROWD = (
    STEPS
    + """
registry.publish(source)
registry.publish(source)
registry.promote("tiny", "1")
registry.promote("tiny", "2")
gate_in, gate_out = os.pipe()

def publisher():
    os.read(gate_in, 1)
    mine = [registry.publish(source).version for _ in range(6)]
    os.write(1, (" ".join(mine) + "\\n").encode())

def promoter():
    os.read(gate_in, 1)
    for version in ("1", "2", "1", "2"):
        registry.promote("tiny", version)
        registry.rollback("tiny")

def reader():
    os.read(gate_in, 1)
    for _ in range(60):
        Bundle.open(registry.resolve("tiny").path)

pids = [fork(child) for child in (publisher, publisher, publisher, publisher,
                                  promoter, promoter, reader)]
os.write(gate_out, b"x" * len(pids))
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
assert codes == [0] * len(pids), codes
"""
)


def drive(script: str, tmp_path: Path, write: Write) -> str:
    source = write(tmp_path / "source")
    (tmp_path / "registry").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "registry")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def test_kill_at_every_step_leaves_whole_versions_and_a_valid_alias(
    tmp_path: Path, write: Write
) -> None:
    steps = int(drive(KILL, tmp_path, write))
    assert steps > 30, "the steps of publishing are no longer seen"

    # What the killed ones left behind goes with the next publication, once it is old enough.
    folder = tmp_path / "registry" / "tiny"
    stages = list(folder.glob(".stage-*"))
    assert stages
    for stage in stages:
        os.utime(stage, (0, 0))
    Registry(tmp_path / "registry").publish(tmp_path / "source")
    assert not list(folder.glob(".stage-*"))


def test_a_full_disk_at_every_step_changes_nothing_and_is_reported(
    tmp_path: Path, write: Write
) -> None:
    lines = drive(FULL_DISK, tmp_path, write).split()
    assert lines[::2] == ["publish", "promote"]
    assert int(lines[1]) > 10
    assert int(lines[3]) >= 2


def test_many_at_once_never_collide(tmp_path: Path, write: Write) -> None:
    published = [int(version) for version in drive(CROWD, tmp_path, write).split()]

    assert sorted(published) == list(range(3, 27))
    registry = Registry(tmp_path / "registry")
    for version in registry.versions("tiny"):
        assert Bundle.open(registry.root / "tiny" / version).manifest.version == version
    assert set(registry.aliases("tiny")) == {"production", "previous"}
    assert set(registry.aliases("tiny").values()) == {"1", "2"}
