"""Fuzzes the readers of strangers' bytes: `python tests/chaos/fuzz.py --seconds 600`.

Coverage-guided (libFuzzer by Atheris, https://github.com/google/atheris): inputs that reach new
lines of the server, of Pillow's format plugins or of the form parser are kept and changed further.
Each target has its share of the time in a process of its own. An input that makes one fail is left
in `--keep`; put it into tests/chaos/inputs/<target>, mend the server, and `make test` tries it for
good.
"""

import argparse
import ctypes
import os
import re
import sys
import time
import warnings
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType, ModuleType

import atheris
import fuzz_targets

# Whose branches guide the search; all of PIL and of the server would take ten seconds to prepare.
_READERS = [
    *(
        f"serving.{name}"
        for name in ("chat", "connection", "decode_image", "feedback", "image_walk")
    ),
    *(f"serving.{name}" for name in ("json_body", "onnx_walk", "request", "tensors")),
    *(f"PIL.{name}ImagePlugin" for name in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Tiff", "WebP")),
    *("exports.images", "python_multipart.multipart", "starlette.formparsers"),
]
_SECONDS_FOR_ONE = 10
_MEGABYTES = 2048
_LONGEST = 4096  # bytes of an input
_EXECUTED = re.compile(r"stat::number_of_executed_units: (\d+)|^Done (\d+) runs", re.MULTILINE)
_COVERED = re.compile(r" cov: (\d+)")
_LIBC = ctypes.CDLL(None)


def _instrument(module: ModuleType) -> None:
    """Has the functions of a module, and the methods of its classes, report their branches."""
    for value in list(vars(module).values()):
        if getattr(value, "__module__", "") != module.__name__:
            continue
        for function in vars(value).values() if isinstance(value, type) else [value]:
            if isinstance(function, FunctionType):
                atheris.instrument_func(function)


def _fuzz(name: str, seconds: int, seed: int, corpus: Path, keep: Path) -> None:
    """Fuzzes one target; ends the process."""
    warnings.simplefilter("ignore")
    target = fuzz_targets.TARGETS[name]
    failed = False

    def watched(body: bytes) -> None:
        nonlocal failed
        try:
            target(body)
        except BaseException:
            failed = True
            (keep / f"{name}-{sha256(body).hexdigest()[:12]}").write_bytes(body)
            raise

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def end(_: object) -> None:
        # A fork has none of its parent's threads, which ONNX Runtime would wait for at the end.
        if not failed:
            os._exit(0)

    def mutate_image(body: bytes, size: int, _: int) -> bytes:
        return bytes(fuzz_targets.mend_png(bytes(atheris.Mutate(body, size))))[:size]

    arguments = [
        sys.argv[0],
        str(corpus),
        f"-artifact_prefix={keep}/{name}-",
        f"-max_total_time={seconds}",
        f"-timeout={_SECONDS_FOR_ONE}",
        f"-rss_limit_mb={_MEGABYTES}",
        f"-max_len={_LONGEST}",
        f"-seed={seed}",
        "-print_final_stats=1",
    ]
    mutator = {"custom_mutator": mutate_image} if name == "image" else {}
    atheris.Setup(arguments, watched, **mutator)
    _LIBC.__cxa_atexit(end, None, None)
    atheris.Fuzz()


def _one(name: str, seconds: int, seed: int, folder: Path, keep: Path) -> bool:
    """Fuzzes one target in a child and says what came of it; returns whether nothing was found."""
    log = folder / f"{name}.log"
    start = time.monotonic()
    child = os.fork()
    if not child:
        with log.open("wb") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        try:
            _fuzz(name, seconds, seed, folder / name, keep)
        finally:
            os._exit(70)  # Fuzz ends the process by itself
    _, status = os.waitpid(child, 0)
    said = log.read_text("utf-8", "replace")
    executed = max((int(a or b) for a, b in _EXECUTED.findall(said)), default=0)
    covered = max(map(int, _COVERED.findall(said)), default=0)
    found = status != 0 or executed == 0
    print(
        f"{name}: {executed:,} executions in {time.monotonic() - start:.0f} s, "
        f"{covered:,} branches reached, {'FOUND A FAULT' if found else 'nothing found'}",
        flush=True,
    )
    if found:
        print(said[-4000:])
    return not found


def main() -> int:
    """Fuzzes all targets in turn; returns 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(fuzz_targets.TARGETS)}")
    parser.add_argument("--seconds", type=int, default=60, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--keep", type=Path, default=Path(), help="where failing inputs are left")
    chosen = parser.parse_args()
    names = chosen.targets or list(fuzz_targets.TARGETS)
    share = max(chosen.seconds // len(names), 1)
    seeds = fuzz_targets.seeds()
    for reader in _READERS:
        _instrument(import_module(reader))
    with TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name).mkdir()
            for at, body in enumerate(seeds[name]):
                (Path(folder) / name / str(at)).write_bytes(body)
        results = [_one(name, share, chosen.seed, Path(folder), chosen.keep) for name in names]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
