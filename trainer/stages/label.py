"""`python -m trainer label RECIPE`: a page on this machine where a person writes the captions.

Every answer is on disk before the next photograph shows; `--out` holds them in `answers.jsonl`,
which `finetune` takes as `data.train`. Ctrl-C ends the page, the same command goes on where it was.
With `refit` the model learns from the labels beside the page, and with `order` what is left is put
in a new order.
"""

import signal
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from pydantic import Field

from trainer.config import Config as BaseConfig
from trainer.config import write_resolved
from trainer.labelling.answers import Answers
from trainer.labelling.label_files import export_coco, read_labels, take_over
from trainer.labelling.label_studio import export_label_studio
from trainer.labelling.photo_list import read_photos, read_picks
from trainer.labelling.proposals import Proposals
from trainer.labelling.refits import Refits
from trainer.labelling.server import LabelServer
from trainer.labelling.session import Photo, Session
from trainer.stages._rounds import Rounds, newest_run, proposer

_LOOK = 0.5  # seconds between two looks at how many there are
_SHOWN = 20  # notes that are printed; the rest is counted


class Export(BaseConfig):
    """Keys of `[export]`: files that are written when the page opens and when it ends."""

    coco: Path | None = None
    label_studio: Path | None = None


class Config(BaseConfig):
    """A recipe that labels."""

    images: Path
    """A folder or any data set; what has captions there needs no label."""
    folder: Path | None = None
    """The folder that image names are relative to; by default found beside the data set."""
    picks: Path | None = None
    """A table that names the images to begin with, best first, as `acquire` writes it."""
    model: Path | None = None
    """A run or a bundle whose captions are proposed."""
    labels: tuple[Path, ...] = ()
    """Label files of other tools, to begin with; what is answered here already stays."""
    captions_per_image: int = Field(default=1, ge=1, le=10)
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes any that is free."""
    open_browser: bool = False
    refit: Path | None = None
    """A recipe of `finetune` that learns from the labels in the background."""
    order: Path | None = None
    """A recipe of `acquire` that puts in order what is left, after each time."""
    refit_every: int = Field(default=20, ge=1)
    """Labels between two times."""
    until: int | None = Field(default=None, ge=1)
    """The page ends by itself when so many images are labelled."""
    export: Export = Export()


def run(config: Config, out_dir: Path) -> None:
    """Serves the page until Ctrl-C, SIGTERM, or enough labels.

    Raises:
        DataError: there is nothing to label, a file cannot be read, the port is taken, or another
            process labels in `out_dir`.
        CheckpointError, BundleError: there is no model where `model` says.
    """
    photos, folder, notes = read_photos(config.images, config.folder)
    _print_notes(notes)
    with closing(Answers(out_dir)) as answers:
        write_resolved(config, out_dir / "recipe.json")
        _print_notes([*answers.notes, *_strangers(answers, photos)])
        session = _session(config, photos, folder, answers)
        model = newest_run(out_dir) if config.refit else None
        if model := model or config.model:
            session.proposals.use(proposer(model))
        refits = None
        if config.refit or config.order:
            rounds = Rounds(session, config.images, folder, out_dir, config.refit, config.order)
            refits = Refits(out_dir, config.refit_every, rounds.steps)
        _export(config.export, session, folder)
        with LabelServer(session, refits, port=config.port) as server, _working(session, refits):
            _serve(server, lambda: _enough(config, session), open_browser=config.open_browser)
        _export(config.export, session, folder)
        _say_what_next(config, session, folder)


def _session(config: Config, photos: Sequence[Photo], folder: Path, answers: Answers) -> Session:
    """Returns the work, with what other label files say taken over."""
    labels = [read_labels(path, photos, folder) for path in config.labels]
    given: dict[int, list[str]] = {}
    for one in labels:
        for number, texts in one.proposals.items():
            given.setdefault(number, []).extend(texts)
    session = Session(
        photos,
        answers,
        Proposals([photo.path for photo in photos], given),
        captions_per_image=config.captions_per_image,
    )
    if config.picks is not None:
        picks, notes = read_picks(config.picks, photos)
        session.prefer(picks)
        _print_notes(notes)
    for path, one in zip(config.labels, labels, strict=True):
        count, notes = take_over(one, session)
        print(f"{path}: {count} labels taken over")
        _print_notes([*one.notes, *notes])
    return session


def _strangers(answers: Answers, photos: Sequence[Photo]) -> list[str]:
    names = {photo.name for photo in photos}
    return [
        f"{answers.path}: {one.image} was answered, but is not among the images to label; kept"
        for one in answers.all()
        if one.image not in names
    ]


@contextmanager
def _working(session: Session, refits: Refits | None) -> Iterator[None]:
    """Lets models speak and learn beside the page."""
    session.proposals.start(session.upcoming)
    try:
        if refits is not None:
            refits.consider(session.progress().labelled)  # a round may have been broken off
        yield
    finally:
        if refits is not None:
            refits.stop()
        session.proposals.stop()


def _enough(config: Config, session: Session) -> bool:
    return config.until is not None and session.progress().labelled >= config.until


def _serve(server: LabelServer, enough: Callable[[], bool], *, open_browser: bool) -> None:
    """Serves until a signal says to end, or there are enough labels."""
    ended = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: ended.set()) for number in signals]
    thread = threading.Thread(target=server.serve_forever, name="page", daemon=True)
    thread.start()
    print(f"the page is at {server.url} (Ctrl-C ends it)", flush=True)
    if open_browser:
        webbrowser.open(server.url)
    while not (enough() or ended.wait(_LOOK)):
        pass
    server.shutdown()
    thread.join()
    for number, handler in zip(signals, before, strict=True):
        signal.signal(number, handler)


def _export(export: Export, session: Session, folder: Path) -> None:
    if export.coco is not None:
        export_coco(export.coco, session.answers, folder)
    if export.label_studio is not None:
        export_label_studio(export.label_studio, session)


def _say_what_next(config: Config, session: Session, folder: Path) -> None:
    progress, path = session.progress(), session.answers.path
    print(
        f"\n{progress.labelled} of {len(session.photos)} images are labelled, "
        f"{progress.begun} begun, {progress.skipped} skipped: {path}"
    )
    for written in (config.export.coco, config.export.label_studio):
        if written is not None:
            print(f"wrote {written}")
    if progress.labelled or progress.begun:
        recipe = config.refit or "RECIPE"
        print(
            "next: python -m trainer finetune "
            f"{recipe} data.train={path} data.images={folder} --out runs/labelled"
        )
    else:
        print("next: the same command goes on")


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes[:_SHOWN]:
        print(f"  {note}")
    if len(notes) > _SHOWN:
        print(f"  ... and {len(notes) - _SHOWN} more")
