import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exports.bundle import Bundle
from exports.errors import BundleError, RegistryError
from exports.registry import DEFAULT_REGISTRY, Registry

Write = Callable[[Path], Path]


@pytest.fixture
def source(tmp_path: Path, write: Write) -> Path:
    return write(tmp_path / "source")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def damage(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[0] ^= 1
    path.write_bytes(body)


def test_versions_count_up_and_sort_naturally(registry: Registry, source: Path) -> None:
    for _ in range(11):
        registry.publish(source)
    registry.publish(source, version="2-rc1")

    assert registry.models() == ["tiny"]
    assert registry.versions("tiny") == [
        *["1", "2", "2-rc1"],
        *[str(number) for number in range(3, 12)],
    ]


def test_a_published_bundle_says_where_it_stands(registry: Registry, source: Path) -> None:
    published = registry.publish(source, model="other", version="7")

    bundle = Bundle.open(published.path)

    assert (bundle.manifest.name, bundle.manifest.version) == ("other", "7")
    assert published.path == registry.root / "other" / "7"
    assert bundle.files() == Bundle.open(source).files()


def test_references(registry: Registry, source: Path) -> None:
    for _ in range(3):
        registry.publish(source)
    assert registry.resolve("tiny").version == "3"

    registry.promote("tiny", "2")

    assert registry.resolve("tiny").version == "2"
    assert registry.resolve("tiny@production").reference == "tiny@2"
    assert registry.resolve("tiny@1").path == registry.root / "tiny" / "1"


def test_the_packaged_model_goes_live_by_promotion_alone(tmp_path: Path, write: Write) -> None:
    shutil.copytree(DEFAULT_REGISTRY / "cutline-base", tmp_path / "models" / "cutline-base")
    registry = Registry(tmp_path / "models")
    assert registry.aliases("cutline-base") == {"production": "2"}

    registry.publish(write(tmp_path / "source"), model="cutline-base", version="3")
    assert registry.resolve("cutline-base").version == "2"
    registry.promote("cutline-base", "3")
    assert registry.resolve("cutline-base").version == "3"
    registry.rollback("cutline-base")
    assert registry.resolve("cutline-base").version == "2"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("tinny", "it has tiny"),
        ("tiny@4", "tiny has 1"),
        ("tiny@production", "tiny has 1"),
        ("tiny@../../source", "tiny has 1"),
        ("../source", "no model name"),
        ("", "no model name"),
    ],
)
def test_an_unknown_reference_says_what_there_is(
    registry: Registry, source: Path, reference: str, message: str
) -> None:
    registry.publish(source)
    with pytest.raises(RegistryError, match=message):
        registry.resolve(reference)


def test_promote_and_rollback(registry: Registry, source: Path) -> None:
    for _ in range(3):
        registry.publish(source)

    registry.promote("tiny", "1")
    assert registry.aliases("tiny") == {"production": "1"}
    with pytest.raises(RegistryError, match="no previous version"):
        registry.rollback("tiny")

    registry.promote("tiny", "3")
    registry.promote("tiny", "3")  # again: the way back must not be lost
    assert registry.aliases("tiny") == {"production": "3", "previous": "1"}

    assert registry.rollback("tiny").version == "1"
    assert registry.aliases("tiny") == {"production": "1", "previous": "3"}
    assert registry.promote("tiny", "previous").version == "3"


def test_a_damaged_bundle_is_neither_published_nor_promoted(
    registry: Registry, source: Path
) -> None:
    for _ in range(2):
        registry.publish(source)
    registry.promote("tiny", "1")
    damage(registry.root / "tiny" / "2" / "decoder.onnx")
    damage(source / "encoder.onnx")

    with pytest.raises(BundleError, match=r"decoder\.onnx"):
        registry.promote("tiny", "2")
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        registry.publish(source)

    assert registry.aliases("tiny") == {"production": "1"}
    assert registry.versions("tiny") == ["1", "2"]


def test_rollback_verifies_too(registry: Registry, source: Path) -> None:
    for version in ("1", "2"):
        registry.publish(source)
        registry.promote("tiny", version)
    damage(registry.root / "tiny" / "1" / "tokenizer.json")

    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        registry.rollback("tiny")
    assert registry.resolve("tiny").version == "2"


def test_a_bundle_under_a_foreign_name_is_not_promoted(registry: Registry, source: Path) -> None:
    registry.publish(source)
    (registry.root / "tiny" / "1").rename(registry.root / "tiny" / "2")

    with pytest.raises(BundleError, match="is of tiny@1, but stands under tiny@2"):
        registry.promote("tiny", "2")


def test_a_version_is_never_overwritten(registry: Registry, source: Path) -> None:
    digest = Bundle.open(registry.publish(source, version="5").path).digest

    with pytest.raises(RegistryError, match="tiny@5 exists already"):
        registry.publish(source, version="5")

    assert Bundle.open(registry.root / "tiny" / "5").digest == digest
    assert [path.name for path in (registry.root / "tiny").iterdir()] == ["5"]


def test_what_was_copied_by_hand_and_is_half_there_is_no_version(
    registry: Registry, source: Path
) -> None:
    registry.publish(source)
    (registry.root / "tiny" / "2").mkdir()
    (registry.root / "tiny" / "2" / "encoder.onnx").write_bytes(b"half")

    assert registry.resolve("tiny").version == "1"
    assert registry.publish(source).version == "3"


@pytest.mark.parametrize("name", ["Tiny", "a/b", "..", "", "x" * 65, "tiny@1"])
def test_bad_names_are_refused_before_anything_is_written(
    registry: Registry, source: Path, name: str
) -> None:
    with pytest.raises(RegistryError, match="no model name"):
        registry.publish(source, model=name)
    with pytest.raises(RegistryError, match="no version"):
        registry.publish(source, version=f"/{name}")
    assert not registry.root.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"production": 1}', '{"production": "1"'])
def test_a_damaged_alias_file_is_named(registry: Registry, source: Path, content: str) -> None:
    registry.publish(source)
    path = registry.root / "tiny" / "aliases.json"
    path.write_text(content)

    with pytest.raises(RegistryError) as caught:
        registry.resolve("tiny")
    assert str(path) in str(caught.value)


def test_rollback_gets_away_from_a_version_that_is_gone(registry: Registry, source: Path) -> None:
    for version in ("1", "2"):
        registry.promote("tiny", registry.publish(source, version=version).version)
    shutil.rmtree(registry.root / "tiny" / "2")

    assert registry.rollback("tiny").version == "1"
    assert registry.resolve("tiny").version == "1"


def test_an_alias_to_a_version_that_is_gone_is_explained(registry: Registry, source: Path) -> None:
    registry.publish(source)
    (registry.root / "tiny" / "aliases.json").write_text(json.dumps({"production": "9"}))

    with pytest.raises(RegistryError, match=r"no tiny \(which is version 9\)"):
        registry.resolve("tiny")
    with pytest.raises(RegistryError, match=r"tiny@production \(which is version 9\)"):
        registry.resolve("tiny@production")


def test_a_registry_is_a_folder() -> None:
    with pytest.raises(RegistryError, match="not a URL"):
        Registry("s3://bucket/models")
    with pytest.raises(RegistryError, match="no registry at"):
        Registry("/nowhere/at/all").models()
