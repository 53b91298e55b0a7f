"""What can go wrong in the contract.

ExportsError
├── BundleError     a bundle is incomplete, damaged, tampered with, or cannot be written
├── RegistryError   no such model, version or alias, or the registry cannot be changed
└── ImageError      pixels that cannot be decoded or converted

Every message names the file or the name concerned, and says what was found there.
"""


class ExportsError(Exception):
    """Base of every error that this package raises on purpose."""


class BundleError(ExportsError):
    """A bundle is incomplete, damaged, tampered with, or cannot be written."""


class RegistryError(ExportsError):
    """No such model, version or alias, or the registry cannot be changed."""


class ImageError(ExportsError):
    """Pixels that cannot be decoded or converted to RGB."""
