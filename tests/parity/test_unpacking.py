"""A bundle becomes the captioner again that it was exported from, whatever its precision."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import PHOTOS, SYSTEMS, random_captioner

from exports.bundle import Bundle
from trainer import unpacking
from trainer.__main__ import main
from trainer.captioner import Captioner
from trainer.compression import round_weights
from trainer.config import validate
from trainer.errors import CheckpointError, ConfigError
from trainer.graphs import export_decoder, export_encoder
from trainer.photos import load_pixels
from trainer.run import Recipe, Run
from trainer.stages import finetune


def tables_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "recipe.json").read_text(encoding="utf-8")))


@pytest.fixture(params=["fp32", "int8", "fp16"])
def bundle(request: pytest.FixtureRequest, exported: tuple[Path, Path]) -> Path:
    if request.param == "fp32":
        return exported[1]
    found: Path = request.getfixturevalue(f"exported_{request.param}")
    return found


def test_a_bundle_becomes_a_run_again(
    exported: tuple[Path, Path], bundle: Path, tmp_path: Path
) -> None:
    assert main(["import", str(bundle), "--out", str(tmp_path / "run")]) == 0
    before, after = Run(exported[0]), Run(tmp_path / "run")
    assert after.tokenizer_json == before.tokenizer_json and after.text == before.text
    pixels = np.stack([load_pixels(path, before.recipe.image) for path in PHOTOS])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    ids = torch.tensor([[before.text.bos_id, 30, 40, 50]] * len(PHOTOS))
    with torch.no_grad():
        old, new = (run.captioner()(images, ids).log_softmax(-1) for run in (before, after))
    # Of the size of what rounding to 7 bits changes; another weight in a place changes all.
    assert (old - new).abs().mean() < 0.05 * old.std()


def computed_elsewhere(decoder: str, bridge: str) -> list[str]:
    """Names of the weights of which graphs keep only what is computed of them."""
    if decoder == "t5":  # biases by bucket become biases by distance
        return [
            "decoder.model.decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ]
    gated = bridge == "perceiver" or (decoder, bridge) == ("llama", "cross_attention")
    return [
        f"decoder.gated.{n}.{kind}_gate" for n in range(2 * gated) for kind in ("attention", "mlp")
    ]


@pytest.mark.parametrize(
    ("decoder", "bridge"),
    [
        pytest.param(*pair, marks=() if pair == ("llama", "prefix") else pytest.mark.slow)
        for pair in SYSTEMS
    ],
)
def test_graphs_of_every_system_are_read_back(decoder: str, bridge: str) -> None:
    captioner, other = (varied(random_captioner("timm_vit", bridge, decoder), n) for n in range(2))
    target = unpacking._Target.of(other)
    graphs = (export_encoder(captioner)[0], export_decoder(captioner)[0])
    for graph, uses in zip(graphs, target.uses, strict=True):
        target.take(unpacking._Constants.of(graph), uses)
    left = computed_elsewhere(decoder, bridge)
    assert target.left() == left
    known = captioner.state_dict()
    for name, tensor in other.state_dict().items():
        if name not in left:
            assert torch.equal(tensor, known[name]), name


def varied(captioner: Captioner, seed: int) -> Captioner:
    """Returns a captioner with no two weights alike: exporters keep equal constants once."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return round_weights(captioner)


def test_what_is_not_the_bundle_s_captioner_is_refused(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.open(exported[1])
    provenance, golden = bundle.manifest.provenance, bundle.manifest.golden

    def refused(**changes: Any) -> str:
        other = copy.copy(bundle)
        other.manifest = bundle.manifest.model_copy(update=changes)
        with pytest.raises(CheckpointError) as error:
            unpacking.unpack(other)
        return str(error.value)

    assert "it was imported" in refused(provenance={"imported": "Blip"})
    wrong = golden[0].model_copy(update={"score": golden[0].score + 0.1})
    assert f"{golden[0].text!r} scores" in refused(golden=(wrong,))
    recipe = {**provenance["recipe"]}  # type: ignore[dict-item]
    recipe["decoder"] = {**recipe["decoder"], "layers": 3}
    assert "products with weights, not" in refused(provenance={"recipe": recipe})
    recipe["decoder"] = {**recipe["decoder"], "layers": 2, "width": 64}
    assert "in product 50, not (64, 1280)" in refused(provenance={"recipe": recipe})
    out = tmp_path / "run"
    shutil.copytree(exported[0], out, ignore=shutil.ignore_patterns("bundle"))
    assert main(["import", str(exported[1]), "--out", str(out)]) == 1
    assert "holds a run; choose another" in capsys.readouterr().err
    fresh = ["--out", str(tmp_path / "fresh")]
    assert main(["import", str(exported[1]), "--name", "x", *fresh]) == 1
    assert "is a bundle already" in capsys.readouterr().err
    assert main(["import", str(exported[1].parent), *fresh]) == 1
    assert "has no manifest.json, so is no bundle" in capsys.readouterr().err


def test_a_run_learns_on_from_a_bundle_without_saying_how_it_is_built(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    assert main(["import", str(exported[1]), "--out", str(tmp_path / "start")]) == 0
    whole = tables_of(exported[0])
    table = {
        "start": str(tmp_path / "start"),
        "data": {"train": whole["data"]["train"]},
        "objective": {"name": "lm"},
        "loop": {"epochs": 2, "batch_size": 4, "workers": 0},
    }
    config = Recipe.model_validate(table)
    assert [config.encoder, config.decoder] == [whole["encoder"], whole["decoder"]]
    assert losses_of(config, tmp_path / "on") == pytest.approx(
        losses_of(config.model_copy(update={"start": exported[0]}), tmp_path / "straight"), rel=0.02
    )
    assert finetune.Config.model_validate({**table, "image": whole["image"]}) == config


def losses_of(config: Recipe, out: Path) -> list[float]:
    finetune.run(config, out)
    lines = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_start_that_is_no_run_leaves_tables_missing(tmp_path: Path) -> None:
    table = {
        "start": str(tmp_path),
        "data": {"train": "x.csv"},
        "objective": {"name": "lm"},
        "loop": {"epochs": 1, "batch_size": 4},
    }
    with pytest.raises(ConfigError, match="encoder: field required"):
        validate(Recipe, table, "recipe")
