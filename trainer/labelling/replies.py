"""What the labelling page posts, and what is refused of it."""

from http import HTTPStatus
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer.labelling.answers import cleaned

Tab = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")]


class Reply(BaseModel):
    """What the page sends."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AnswerReply(Reply):
    """What a person answered; `revision` is the one that the tab has seen."""

    tab: Tab
    revision: int = Field(ge=0, lt=1 << 31)
    action: Literal["accept", "edit", "skip", "clear"]
    captions: list[Annotated[str, Field(max_length=1000)]] = Field(max_length=20)
    proposal: int | None = Field(default=None, ge=1, le=9)
    seconds: float = Field(default=0.0, ge=0, le=86400, allow_inf_nan=False)

    def texts(self) -> list[str]:
        """Returns the captions as they are kept.

        Raises:
            Refused: they do not fit the action, or one is there twice.
        """
        texts = [cleaned(text) for text in self.captions]
        if not all(texts):
            raise Refused(HTTPStatus.BAD_REQUEST, "a caption has no words")
        if len({text.casefold() for text in texts}) < len(texts):
            raise Refused(HTTPStatus.BAD_REQUEST, "the photograph has this caption already")
        if self.action in ("accept", "edit") and not texts:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{self.action} without a caption")
        if self.action == "clear" and texts:
            raise Refused(HTTPStatus.BAD_REQUEST, "clear with a caption")
        return texts


class ReleaseReply(Reply):
    """A tab is closed."""

    tab: Tab


class Refused(Exception):
    """What a client is told instead of an answer, with its HTTP status."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status
