"""What can go wrong while serving, as one tree.

CaptionError                    500
 +- MalformedRequest            400  the body is not what its type says
 +- UndecodableImage            400  an image type that we read, but the bytes are damaged
 +- UnknownModel                404
 +- BodyTimeout                 408  the body did not arrive in time
 +- ImageTooLarge               413  more bytes or pixels than the limits allow
 +- NotAnImage                  415
 +- ParameterError              422
 +- QueueFull                   429  no room for more; carries `retry_after`, whole seconds
 +- CaptionFailed               500  the model gave no caption for this image
 +- BundleRejected              500  a bundle that must not be served; never reaches a client
 +- NotReady                    503
 +- DeadlineExceeded            504

`status` and `title` belong to the class; `detail` belongs to the occurrence and may be shown to a
client.
"""

from typing import ClassVar

from exports.errors import Cause


class CaptionError(Exception):
    """The root: everything that serving raises on purpose."""

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str) -> None:
        """Keeps `detail`, one sentence for the client: what was found and what to do."""
        super().__init__(detail)
        self.detail = detail


class MalformedRequest(CaptionError):
    """The body is not what its type says."""

    status = 400
    title = "Malformed request"


class UndecodableImage(CaptionError):
    """The body claims an image type that we read, but it does not decode."""

    status = 400
    title = "Undecodable image"


class UnknownModel(CaptionError):
    """No such model or version is served here."""

    status = 404
    title = "Unknown model"


class BodyTimeout(CaptionError):
    """The body did not arrive in time."""

    status = 408
    title = "Request timeout"


class ImageTooLarge(CaptionError):
    """The body has too many bytes, or the image too many pixels."""

    status = 413
    title = "Image too large"


class NotAnImage(CaptionError):
    """The body is none of the image types that we read."""

    status = 415
    title = "Not an image"


class ParameterError(CaptionError):
    """A generation parameter is out of range."""

    status = 422
    title = "Parameter out of range"


class QueueFull(CaptionError):
    """More images or bytes of requests would be held than the server has room for."""

    status = 429
    title = "Queue full"

    def __init__(self, detail: str, *, retry_after: int) -> None:
        """Keeps `retry_after`, the whole seconds after which there should be room."""
        super().__init__(detail)
        self.retry_after = retry_after


class CaptionFailed(CaptionError):
    """The model gave no caption for this image."""

    status = 500
    title = "Captioning failed"


class BundleRejected(CaptionError):
    """A bundle is damaged, or its graphs do not run here or not as its manifest promises."""

    status = 500
    title = "Bundle rejected"

    def __init__(self, detail: str, cause: Cause = "onnx") -> None:
        """Keeps `cause`, the kind of fault."""
        super().__init__(detail)
        self.cause: Cause = cause


class NotReady(CaptionError):
    """No model is loaded yet, or the server is closing."""

    status = 503
    title = "Not ready"


class DeadlineExceeded(CaptionError):
    """The deadline passed before the caption was there."""

    status = 504
    title = "Deadline exceeded"
