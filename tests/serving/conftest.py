"""Fixtures of the serving tests: tiny bundles, written once a session."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_bundle import black_picture, picture, write_tiny_bundle

from serving.captioner import Captioner


@dataclass(frozen=True)
class TinyBundles:
    """Folders of bundles of the model `tiny`; never written to by a test."""

    one: Path
    two: Path
    broken_golden: Path
    nan: Path
    matching: Path
    broken_match: Path


@pytest.fixture(scope="session")
def tiny_bundles(tmp_path_factory):
    """Version 1; version 2 with other captions; two that only the check of captions refuses.

    `matching` is version 1 with a matcher; what `broken_match` promises of one is not so.
    """
    root = tmp_path_factory.mktemp("bundles")
    return TinyBundles(
        one=write_tiny_bundle(root / "one", version="1", seed=0),
        two=write_tiny_bundle(root / "two", version="2", seed=1),
        broken_golden=write_tiny_bundle(root / "broken", version="3", broken_golden=True),
        nan=write_tiny_bundle(root / "nan", version="4", nan=True),
        matching=write_tiny_bundle(root / "matching", version="5", matcher=True),
        broken_match=write_tiny_bundle(
            root / "broken_match", version="6", matcher=True, broken_match=True
        ),
    )


@pytest.fixture(scope="session")
def tiny_captioner(tiny_bundles):
    """Version 1, loaded."""
    return Captioner.load(tiny_bundles.one, threads=1, provider="cpu")


@pytest.fixture(scope="session")
def matching_captioner(tiny_bundles):
    """Version 1 with a matcher, loaded."""
    return Captioner.load(tiny_bundles.matching, threads=1, provider="cpu")


@pytest.fixture(scope="session")
def photos():
    """The bytes of eight different PNG files."""
    return [picture(seed) for seed in range(8)]


@pytest.fixture(scope="session")
def black_photo():
    """The bytes of an image that makes the tiny captioner's numbers NaN."""
    return black_picture()
