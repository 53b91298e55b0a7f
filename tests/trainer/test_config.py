"""Recipes: strict, overridable, and clear about what is wrong."""

import re
from errno import ENOSPC
from pathlib import Path

import pytest

from trainer import variants
from trainer.__main__ import main
from trainer.config import Config, read_recipe, validate, write_resolved
from trainer.errors import ConfigError


class Inner(Config):
    depth: int = 1


class Outer(Config):
    rate: float
    inner: Inner = Inner()
    other: Inner | None = None


def test_overrides_reach_into_tables(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("rate = 1.0\n[inner]\ndepth = 2\n")
    table = read_recipe(recipe, ["rate=0.5", "inner.depth=7", "note=a plain/path"])
    assert table == {"rate": 0.5, "inner": {"depth": 7}, "note": "a plain/path"}


@pytest.mark.parametrize("override", ["rate", "rate.deeper=1"])
def test_an_override_that_fits_nothing_is_named(tmp_path: Path, override: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("rate = 1.0\n")
    with pytest.raises(ConfigError, match=override):
        read_recipe(recipe, [override])


def test_a_misspelt_key_names_itself_and_the_keys_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'raet'; the keys are inner, other, rate"):
        validate(Outer, {"rate": 1, "raet": 2}, "here")
    with pytest.raises(ConfigError, match=r"'inner\.dept'; the keys are depth"):
        validate(Outer, {"rate": 1, "inner": {"dept": 2}}, "here")
    with pytest.raises(ConfigError, match=r"'other\.dept'; the keys are depth"):
        validate(Outer, {"rate": 1, "other": {"dept": 2}}, "here")


def test_a_wrong_value_says_what_was_found() -> None:
    with pytest.raises(ConfigError, match=r"rate: .*found 'fast'"):
        validate(Outer, {"rate": "fast"}, "here")


@pytest.mark.parametrize("body", [None, "rate = "])
def test_an_unreadable_recipe_is_one_line(tmp_path: Path, body: str | None, capsys) -> None:
    recipe = tmp_path / "recipe.toml"
    if body is not None:
        recipe.write_text(body)
    assert main(["evaluate", str(recipe)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and str(recipe) in message and message.count("\n") == 1


CONTRACT = {
    "encoders": ("Config", "Encoder"),
    "bridges": ("Config", "Bridge"),
    "decoders": ("Config", "Decoder"),
    "objectives": ("Config", "Objective"),
    "metrics": ("score",),
    "stages": ("Config", "run"),
}


@pytest.mark.parametrize("folder", CONTRACT)
def test_every_variant_defines_its_folder_s_names(folder: str) -> None:
    assert variants.names(folder)
    for name in variants.names(folder):
        module = variants.load(folder, name)
        assert module.__doc__
        for member in CONTRACT[folder]:
            assert hasattr(module, member), f"{folder}/{name} lacks {member}"


def test_an_unknown_variant_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'lstm'; there are .*gpt2"):
        variants.parse("decoders", {"name": "lstm"})
    with pytest.raises(ConfigError, match=r"no 'name'; choose one of .*gpt2"):
        variants.parse("decoders", {})
    with pytest.raises(ConfigError, match=r"decoders/gpt2: unknown key 'widht'"):
        variants.parse("decoders", {"name": "gpt2", "widht": 3})


def test_a_disk_that_fills_up_leaves_the_old_recipe(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "recipe.json"
    write_resolved(Outer(rate=0.5), path)
    before = path.read_bytes()

    def full(self: Path, text: str, **keys: str) -> None:
        self.write_bytes(text[:9].encode())
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_resolved(Outer(rate=0.1), path)
    assert path.read_bytes() == before


def test_every_recipe_that_a_text_names_exists() -> None:
    texts = [
        Path("README.md"),
        Path("benchmarks/README.md"),
        *Path("trainer/recipes").rglob("*.toml"),
    ]
    named = {
        name
        for text in texts
        for name in re.findall(r"trainer/recipes/[\w/]+\.toml", text.read_text())
    }
    assert len(named) >= 8
    assert [name for name in sorted(named) if not Path(name).is_file()] == []


@pytest.mark.parametrize("path", sorted(Path("trainer/recipes").rglob("*.toml")), ids=str)
def test_every_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    comment = path.read_text().split("\n\n")[0]
    stage = comment.split("python -m trainer ")[1].split()[0]
    table = read_recipe(path)
    if stage == "auto":  # its command names the photographs, and a preset that is not a usual one
        table["images"] = Path("photos")
        usual = {"auto.toml": "--name mine\n", "auto_from_start.toml": "--start runs/base\n"}
        assert (
            usual.get(path.name if path.parent.name == "recipes" else "", f"--preset {path}")
            in comment
        )
    else:
        assert f"python -m trainer {stage} {path}" in comment
    validate(variants.load("stages", stage).Config, table, str(path))
