"""A run of a few steps on photographs, exported in floats, in integers and in half precision."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.run import Run
from trainer.stages import _bundle, export, finetune

PHOTOS = sorted(Path("tests/photos").glob("*.jpg"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of a few steps on photographs, and its bundle."""
    root = tmp_path_factory.mktemp("exported")
    rows = "".join(
        f"{p.resolve()},a {p.stem} on a table\n{p.resolve()},one {p.stem}\n" for p in PHOTOS
    )
    (root / "photos.csv").write_text("image,caption\n" + rows)
    config = finetune.Config.model_validate(
        {
            "data": {"train": root / "photos.csv", "captions_per_image": 2},
            "image": {"height": 64, "width": 48},
            "tokenizer": {"vocab_size": 300},
            "encoder": {"name": "timm_cnn", "model": "tf_efficientnet_lite0"},
            "bridge": {"name": "cross_attention", "layers": 0},
            "decoder": {"name": "gpt2", "width": 32, "layers": 2, "heads": 2, "max_length": 16},
            "objective": {"name": "lm"},
            "optim": {"lr": 3e-3},
            "loop": {"epochs": 40, "batch_size": 4, "workers": 0},
        }
    )
    finetune.run(config, root / "run")
    card = {"description": "d", "data": "d", "licence": "l", "failures": "f"}
    changes = {"run": root / "run", "name": "photos", "data": root / "photos.csv", "card": card}
    export.run(export.Config.model_validate(changes), root / "run")
    return root / "run", root / "run" / "bundle"


@pytest.fixture(scope="session")
def export_in(exported: tuple[Path, Path]) -> Callable[..., Path]:
    """Returns what exports the same run to a folder in fewer bits; its graphs are traced once."""
    run, _ = exported
    data = run.parent / "photos.csv"
    graphs = _bundle.Graphs.of(Run(run).captioner())

    def export_in(target: Path, **precision: object) -> Path:
        card = {"description": "d", "data": "d", "licence": "l", "failures": "f"}
        table = {"run": run, "name": "photos", "data": data, "card": card, **precision}
        table["golden"] = PHOTOS  # which it has learnt: drawings have no clear captions
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_bundle.Graphs, "of", lambda captioner: graphs)
            export.run(export.Config.model_validate(table), target)
        return target / "bundle"

    return export_in


@pytest.fixture(scope="session")
def exported_int8(
    exported: tuple[Path, Path],
    export_in: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The same run's bundle in integers."""
    data = exported[0].parent / "photos.csv"
    # Four photographs: a budget would judge luck.
    return export_in(tmp_path_factory.mktemp("int8"), int8={"data": data, "budget": 10.0})


@pytest.fixture(scope="session")
def exported_fp16(export_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run's bundle in half precision."""
    return export_in(tmp_path_factory.mktemp("fp16"), fp16={})
