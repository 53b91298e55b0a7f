"""What can go wrong in the contract.

ExportsError
├── BundleError     a bundle is incomplete, damaged, tampered with, or cannot be written
├── RegistryError   no such model, version or alias, or the registry cannot be changed
└── ImageError      pixels that cannot be decoded or converted

Every message names the file or the name concerned, and says what was found there.
"""

from typing import Literal

Cause = Literal["manifest", "hash", "onnx", "golden", "memory", "slow", "registry", "other"]
"""Why a bundle is refused, in one word: a label of a metric, so the set is small and fixed.

manifest   its manifest is missing, malformed, or of another model or version
hash       its files are not those that the manifest lists, byte for byte
onnx       its graphs do not load, do not run, or are not what the manifest says
golden     it does not give the captions that it promises
memory     there is no room for it beside the one that serves
slow       it takes too long to give the captions that it promises
registry   no such version, or the registry cannot be read
other      none of these; the log says more
"""


class ExportsError(Exception):
    """Base of every error that this package raises on purpose."""


class BundleError(ExportsError):
    """A bundle is incomplete, damaged, tampered with, or cannot be written."""

    def __init__(self, message: str, cause: Cause = "manifest") -> None:
        """Keeps `cause`, the kind of fault."""
        super().__init__(message)
        self.cause: Cause = cause


class RegistryError(ExportsError):
    """No such model, version or alias, or the registry cannot be changed."""


class ImageError(ExportsError):
    """Pixels that cannot be decoded or converted to RGB."""
