"""What can go wrong while serving, as one tree.

CaptionError                    500
 +- MalformedRequest            400  the body is not what its type says
 +- UndecodableImage            400  an image type that we read, but the bytes are damaged
 +- Unauthorized                401  no key, or one that is not known
 +- AdminOnly                   403
 +- UnknownModel                404
 +- FeedbackOff                 404
 +- BodyTimeout                 408  the body did not arrive in time
 +- ImageTooLarge               413  more bytes or pixels than the limits allow
 +- NotAnImage                  415
 +- ParameterError              422
 +- FetchFailed                 422  an image could not be fetched from its address
 +- QueueFull                   429  no room for more; carries `retry_after`, whole seconds
 +- RateLimited                 429  the key's rate is used up; carries `retry_after` too
 +- HeadersTooLarge             431
 +- CaptionFailed               500  the model gave no caption for this image
 +- BundleRejected              500  a bundle that must not be served; never reaches a client
 +- LogRefused                  500  a file of bulk captioning; the command line's alone
 +- KeysRejected                500  a keys file that cannot be used; never reaches a client
 +- NotReady                    503
 +- DeadlineExceeded            504
 +- StorageFull                 507  no room on disk for feedback

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


class Unauthorized(CaptionError):
    """The request has no key, or one that is not known here."""

    status = 401
    title = "Unauthorized"

    def __init__(self, detail: str, *, wrong: bool = False) -> None:
        """Keeps whether a key was there."""
        super().__init__(detail)
        self.wrong = wrong


class AdminOnly(CaptionError):
    """The key is good, but no admin key."""

    status = 403
    title = "Forbidden"


class UnknownModel(CaptionError):
    """No such model or version is served here."""

    status = 404
    title = "Unknown model"


class FeedbackOff(CaptionError):
    """This server keeps no feedback."""

    status = 404
    title = "Feedback is off"


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


class FetchFailed(CaptionError):
    """An image could not be fetched from the address that the request names."""

    status = 422
    title = "Image not fetched"


class QueueFull(CaptionError):
    """More images or bytes of requests would be held than the server has room for."""

    status = 429
    title = "Queue full"

    def __init__(self, detail: str, *, retry_after: int) -> None:
        """Keeps `retry_after`, the whole seconds after which there should be room."""
        super().__init__(detail)
        self.retry_after = retry_after


class RateLimited(CaptionError):
    """The key has asked for more than its rate."""

    status = 429
    title = "Rate limit reached"

    def __init__(self, detail: str, *, retry_after: int) -> None:
        """Keeps `retry_after`, the whole seconds after which the key may ask again."""
        super().__init__(detail)
        self.retry_after = retry_after


class HeadersTooLarge(CaptionError):
    """The address and the headers have too many bytes."""

    status = 431
    title = "Request header fields too large"


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


class LogRefused(CaptionError):
    """The file that bulk captioning should append to cannot be, or is none of its own."""

    status = 500
    title = "Log refused"


class KeysRejected(CaptionError):
    """The keys file is missing, damaged or cannot be written."""

    status = 500
    title = "Keys rejected"


class NotReady(CaptionError):
    """No model is loaded yet, or the server is closing."""

    status = 503
    title = "Not ready"


class DeadlineExceeded(CaptionError):
    """The deadline passed before the caption was there."""

    status = 504
    title = "Deadline exceeded"


class StorageFull(CaptionError):
    """The disk, or the part of it that feedback may take, is full."""

    status = 507
    title = "Storage full"
