"""The tiny recipes of all methods: each makes an encoder that is worth more than a random one."""

from pathlib import Path

import pytest
import torch

from trainer import variants
from trainer.__main__ import main
from trainer.runlog import read_log

RECIPES = Path("trainer/recipes/tiny")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    assert main(["shapecaps", str(RECIPES / "shapecaps.toml"), "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", variants.names("methods"))
def test_a_method_makes_a_random_encoder_worth_more(
    name: str, drawings: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    train, dev = drawings / "captions_train.json", drawings / "captions_dev.json"
    paths = [f"data.train={train}", f"probe.captioned={train}", f"probe.dev={dev}"]
    recipe = RECIPES / f"{name}.toml"
    if not recipe.exists():  # a method that has none yet
        recipe, paths = RECIPES / "simclr.toml", [*paths, f'method={{ name = "{name}" }}']
    assert main(["pretrain", str(recipe), "--out", str(tmp_path), *paths]) == 0
    torch.set_num_threads(threads)
    worth = [row["probe/caption_cider"] for row in read_log(tmp_path) if "probe/rankme" in row]
    assert worth[-1] > worth[0] + 0.1
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figure", "worst"),
    [
        ("mlm", "dev/token_accuracy", 0.75),
        ("itc", "dev/IR R@10", 0.9),
        ("itm", "dev/ITM AUC", 0.9),
        ("blip", "dev/CIDEr-D", 2.0),
    ],
)
def test_an_objective_on_pairs_learns_from_random_weights(
    name: str, figure: str, worst: float, drawings: Path, tmp_path: Path
) -> None:
    assert finetuned(name, drawings, tmp_path)[figure] > worst


def finetuned(name: str, drawings: Path, folder: Path) -> dict[str, float]:
    """Returns the last figures of a tiny recipe that is trained in `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    train, dev = drawings / "captions_train.json", drawings / "captions_dev.json"
    paths = [f"data.train={train}", f"data.dev={dev}"]
    assert main(["finetune", str(RECIPES / f"{name}.toml"), "--out", str(folder), *paths]) == 0
    torch.set_num_threads(threads)
    return [row for row in read_log(folder) if "dev/ITM AUC" in row][-1]
