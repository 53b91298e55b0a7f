"""`python -m serving caption`: files and whole folders, without a server.

Photographs are read, hashed and decoded by threads ahead of the captioner, which takes as many
together as it has slots for.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from exports.remote import open_source
from serving.bulk_files import Asked, Line, Log
from serving.captioner import SLOTS, Captioner
from serving.decode_image import ImageLimits, decode_image
from serving.errors import CaptionError, LogRefused, ParameterError, UndecodableImage
from serving.params import Caption, Params
from serving.schema import CaptionAnswer
from serving.session import Pixels
from serving.settings import Settings

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_STOPPED = 130  # what a shell makes of Ctrl-C
_TOLD_S = 30.0  # between two lines about the progress, where nobody watches


@dataclass(frozen=True, slots=True)
class Done:
    """One photograph: what came of it; `result` is None where it was known already."""

    path: Path
    sha256: str
    result: list[Caption] | CaptionError | None


Known = Callable[[Path, str], bool]


def caption(
    photos: Sequence[Path],
    chosen: dict[str, Any],
    settings: Settings,
    *,
    as_json: bool = False,
    out: Path | None = None,
    sidecar: bool = False,
    overwrite: bool = False,
) -> int:
    """Captions photographs and folders of them; returns 0, or 1 if one of them failed.

    Args:
        photos: Files and folders.
        chosen: Fields of `Params` that differ from the bundle's defaults.
        settings: Model, threads and limits.
        as_json: Prints JSON.
        out: Appends to this file instead, of the one folder in `photos`.
        sidecar: Also writes a text file beside each photograph.
        overwrite: Even where somebody else wrote it.

    Raises:
        CaptionError: Nothing can be captioned like this.
        ExportsError: There is no such model.
    """
    _check(photos, as_json, out, sidecar, overwrite)
    paths = [path for photo in photos for path in _files(photo)]
    source = open_source(settings.registry, settings.cache)
    with source.held(source.find(settings.model).resolved) as path:
        captioner = Captioner.load(path, threads=settings.threads, provider=settings.provider)
    params = Params.of(captioner.manifest.defaults, **chosen)
    captioner.check(params)
    if out is None:
        return _print_all(captioned(paths, captioner, params, settings), as_json=as_json)
    asked = Asked(captioner.name, captioner.version, asdict(params))
    try:
        log = Log(out, asked)
    except OSError as error:
        raise LogRefused(f"{out}: {error.strerror}") from error
    try:
        run = _Run(photos[0], log, len(paths), sidecar=sidecar, overwrite=overwrite)
        return run.through(captioned(paths, captioner, params, settings, run.is_known))
    finally:
        log.close()


def _check(
    photos: Sequence[Path], as_json: bool, out: Path | None, sidecar: bool, overwrite: bool
) -> None:
    if out is not None and (as_json or len(photos) != 1 or not photos[0].is_dir()):
        raise ParameterError("--out takes one folder, and nothing is printed then: no --json.")
    if sidecar and out is None:
        raise ParameterError("--sidecar needs --out: by that file it knows which are its own.")
    if overwrite and not sidecar:
        raise ParameterError("--overwrite says what to do with sidecars: add --sidecar.")


def _files(photo: Path) -> list[Path]:
    """Returns a file, or the photographs of a folder and its subfolders by name."""
    if not photo.is_dir():
        return [photo]
    found = [
        path
        for path in sorted(photo.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(photo).parts)
        and path.is_file()
    ]
    if not found:
        raise ParameterError(f"{photo}: holds no photographs ({', '.join(sorted(SUFFIXES))}).")
    return found


def captioned(
    paths: Sequence[Path],
    captioner: Captioner,
    params: Params,
    settings: Settings,
    known: Known = lambda path, digest: False,
) -> Iterator[list[Done]]:
    """Yields what came of each file, in order, batch by batch.

    Args:
        paths: The files.
        captioner: Captions them.
        params: How; checked by `captioner.check`.
        settings: Say how many decode at the same time, and how large an image may be.
        known: Says of a file and its hash, on any thread, that it need not be captioned.
    """
    limits = ImageLimits(max_pixels=settings.max_pixels)
    remaining = iter(paths)
    ahead: deque[Future[tuple[Path, str, Pixels | CaptionError | None]]] = deque()
    pool = ThreadPoolExecutor(settings.decode_threads, "cutline-decode")

    def read(path: Path) -> tuple[Path, str, Pixels | CaptionError | None]:
        try:
            body = path.read_bytes()
        except OSError as error:
            return path, "", UndecodableImage(error.strerror or "cannot be read")
        digest = sha256(body).hexdigest()
        if known(path, digest):
            return path, digest, None
        try:
            return path, digest, decode_image(body, captioner.image_spec, limits)
        except CaptionError as error:
            return path, digest, error

    def submit(count: int) -> None:
        ahead.extend(pool.submit(read, path) for path in islice(remaining, count))

    try:
        submit(2 * SLOTS)
        while ahead:
            batch = [ahead.popleft().result() for _ in range(min(SLOTS, len(ahead)))]
            submit(len(batch))  # decoded while these are captioned
            yield _caption_batch(batch, captioner, params)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _caption_batch(
    batch: Sequence[tuple[Path, str, Pixels | CaptionError | None]],
    captioner: Captioner,
    params: Params,
) -> list[Done]:
    good = [
        pixels
        for _, _, pixels in batch
        if pixels is not None and not isinstance(pixels, CaptionError)
    ]
    found = iter(captioner.caption_batch(good, [params] * len(good)) if good else ())
    return [
        Done(
            path,
            digest,
            pixels if pixels is None or isinstance(pixels, CaptionError) else next(found),
        )
        for path, digest, pixels in batch
    ]


def _print_all(batches: Iterator[list[Done]], *, as_json: bool) -> int:
    failed = False
    for done in (done for batch in batches for done in batch):
        if isinstance(done.result, list):
            print(_json(done.path, done.result) if as_json else _text(done.path, done.result))
        elif done.result is not None:
            sys.stdout.flush()
            _tell_failure(done.path, done.result.detail)
            failed = True
        sys.stdout.flush()
    return int(failed)


class _Run:
    """One run over a folder: what it logs, what it tells."""

    def __init__(
        self, folder: Path, log: Log, total: int, *, sidecar: bool, overwrite: bool
    ) -> None:
        self._folder = folder
        self._log = log
        self._total = total
        self._sidecar = sidecar
        self._overwrite = overwrite
        self._captioned = self._known = self._failed = self._kept = 0
        self._start = self._told = time.monotonic()

    def is_known(self, path: Path, digest: str) -> bool:
        """Returns whether a photograph has its captions already; one that failed is tried again."""
        line = self._log.done(self._name(path), digest)
        return line is not None and not line.error

    def through(self, batches: Iterator[list[Done]]) -> int:
        """Logs what comes and returns the exit code."""
        if self._log.mended:
            print("half a line of a run that was cut off was removed", file=sys.stderr)
        try:
            for batch in batches:
                self._take(batch)
        except KeyboardInterrupt:
            self._tell("\nstopped after ")
            print("the same command goes on from here", file=sys.stderr)
            return _STOPPED
        except OSError as error:
            raise LogRefused(f"{error.filename or 'the log'}: {error.strerror}") from error
        self._tell("\n" if sys.stderr.isatty() else "")
        if self._kept:
            print(
                f"{self._kept} sidecars are somebody else's and were left as they are; "
                "--overwrite replaces them",
                file=sys.stderr,
            )
        return int(self._failed > 0)

    def _name(self, path: Path) -> str:
        name = path.relative_to(self._folder).as_posix()
        return name.encode("utf-8", "backslashreplace").decode()  # JSON holds no other names

    def _take(self, batch: Sequence[Done]) -> None:
        lines = [(done, self._line(done)) for done in batch]
        new = [
            line
            for done, line in lines
            if done.result is not None and line != self._log.done(line.image, line.sha256)
        ]
        if new:
            self._log.append(new)
        for done, line in lines:
            if line.error:
                _tell_failure(done.path, line.error)
                self._failed += 1
                continue
            if done.result is None:
                self._known += 1
            else:
                self._captioned += 1
            if self._sidecar:
                self._put_sidecar(done.path, line)
        self._tell_sometimes()

    def _line(self, done: Done) -> Line:
        name = self._name(done.path)
        if done.result is None:
            known = self._log.done(name, done.sha256)
            assert known is not None  # `is_known` said so
            return known
        if isinstance(done.result, CaptionError):
            return Line(name, done.sha256, (), error=done.result.detail)
        return Line(
            name,
            done.sha256,
            tuple(caption.text for caption in done.result),
            tuple(caption.score for caption in done.result),
        )

    def _put_sidecar(self, path: Path, line: Line) -> None:
        try:
            if not self._log.put_sidecar(path, line, overwrite=self._overwrite):
                self._kept += 1
        except OSError as error:
            _tell_failure(path.with_suffix(".txt"), error.strerror or "cannot be written")
            self._failed += 1

    def _tell_sometimes(self) -> None:
        now = time.monotonic()
        if sys.stderr.isatty():
            self._tell("\r", end="")
        elif now - self._told > _TOLD_S:
            self._told = now
            self._tell("")

    def _tell(self, before: str, end: str = "\n") -> None:
        speed = self._captioned / max(time.monotonic() - self._start, 1e-9)
        print(
            f"{before}{self._total} photographs: {self._captioned} captioned ({speed:.1f}/s), "
            f"{self._known} known already, {self._failed} failed",
            end=end,
            file=sys.stderr,
            flush=True,
        )


def _tell_failure(path: Path, detail: str) -> None:
    print(f"error: {path}: {detail}", file=sys.stderr, flush=True)


def _text(path: Path, captions: list[Caption]) -> str:
    if len(captions) == 1:
        return f"{path}: {captions[0].text}"
    rows = (f"  {caption.score:7.3f}  {caption.text}" for caption in captions)
    return "\n".join((f"{path}:", *rows))


def _json(path: Path, captions: list[Caption]) -> str:
    answers = [CaptionAnswer.model_validate(caption).model_dump() for caption in captions]
    return json.dumps({"file": str(path), "captions": answers}, ensure_ascii=False)
