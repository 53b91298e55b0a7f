"""What a registry says of a shadow: which version answers along, and what decides about it."""

from pydantic import BaseModel, ConfigDict, Field

SHADOW_FILE = "shadow.json"


class ShadowPlan(BaseModel):
    """A candidate that also answers a share of the live requests, and by what it is judged.

    Disagreement is 1 less the mean overlap of the words of both captions (F1, 1 for the same
    caption); an image that only the candidate fails on overlaps by 0. Slowdown is the candidate's
    median seconds a request over those of the version that serves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    share: float = Field(default=0.1, gt=0, le=1)
    min_requests: int = Field(default=200, ge=1)
    max_disagreement: float = Field(default=0.5, ge=0, le=1)
    max_slowdown: float = Field(default=1.5, gt=0, allow_inf_nan=False)
    auto: bool = False
    verdict: str = ""
    """How it ended; while it is empty the shadow goes on."""
