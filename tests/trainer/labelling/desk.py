"""A folder of photographs, a session over it and a server that is running, for tests."""

import threading
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
from PIL import Image

from trainer.labelling.answers import Answers
from trainer.labelling.proposals import Proposals
from trainer.labelling.server import LabelServer
from trainer.labelling.session import Photo, Session


def photographs(folder: Path, count: int = 4) -> list[Photo]:
    """Draws photographs p0.png, p1.png, ..., of different colours."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = []
    for number in range(count):
        path = folder / f"p{number}.png"
        Image.new("RGB", (48, 32), (number * 40 % 256, 90, 160)).save(path)
        photos.append(Photo(path.name, path))
    return photos


@contextmanager
def desk(folder: Path, *, count: int = 4, given=None, **settings):
    """Yields a session over `count` photographs, answers in `folder`/out."""
    photos = photographs(folder / "photos", count)
    with closing(Answers(folder / "out")) as answers:
        proposals = Proposals([photo.path for photo in photos], given)
        yield Session(photos, answers, proposals, **settings)


@contextmanager
def served(session, refits=None):
    """Runs a server and yields a client that sends what its page sends."""
    with LabelServer(session, refits) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            origin = {"Origin": server.url.rstrip("/")}
            with httpx.Client(
                base_url=server.url, headers=origin, timeout=30, verify=False
            ) as client:
                yield client
        finally:
            server.shutdown()
            thread.join()


def reply(revision=0, captions=("a dog",), action="edit", **more):
    """Returns what a page posts."""
    body = {"tab": "one", "revision": revision, "action": action, "captions": list(captions)}
    return body | {"seconds": 1.5} | more
