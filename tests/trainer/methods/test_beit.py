"""BEiT: its blocks, its loss, its frozen tokenizer, and equality with another implementation."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from pretraining import VIT, make_encoder, some_images
from torch.nn import functional as F
from transformers import BeitConfig, BeitForMaskedImageModeling

from trainer import variants
from trainer.checkpoint import load_checkpoint
from trainer.errors import CheckpointError, ConfigError
from trainer.methods import beit
from trainer.methods._method import Setting
from trainer.optim import MovingAverage, Optim, build_optimizer
from trainer.run import PretrainRecipe
from trainer.stages import pretrain

pytestmark = pytest.mark.usefixtures("no_curves")
DVAE = {"name": "dvae", "vocab_size": 32, "width": 16, "blocks": 1, "epochs": 2}
VQ_KD = {**DVAE, "name": "vq_kd", "teacher": VIT}
TOKENIZERS = {"dvae": DVAE, "vq_kd": VQ_KD}


def make_method(encoder=None, tokenizer=DVAE, **keys):
    torch.manual_seed(0)
    config = beit.Config.model_validate({"tokenizer": tokenizer, **keys})
    return beit.Method(config, encoder or make_encoder(), Setting(8, 4, 10))


def test_the_table_of_tokenizers_is_complete() -> None:
    assert sorted(TOKENIZERS) == variants.names("visual_tokenizers")


def test_blocks_are_as_large_as_they_should_and_lie_on_the_grid() -> None:
    draw = random.Random(0)
    blocks = [beit.draw_block(draw, (14, 14), 16, 78) for _ in range(1000)]
    areas = [height * width for _, _, height, width in blocks]
    assert min(areas) >= 16 and 40 < sum(areas) / 1000 < 54  # evenly from 16 to 78 is 47
    for top, left, height, width in blocks:
        assert 0 <= top <= 14 - height and 0 <= left <= 14 - width
        assert 0.2 < height / width < 5  # 0.3 to 1 / 0.3 before rounding and bounds
    tall = sum(height > width for _, _, height, width in blocks)
    flat = sum(height < width for _, _, height, width in blocks)
    assert abs(tall - flat) < 150
    assert {block[:2] for block in blocks} >= {(0, 0), (5, 5)}


@pytest.mark.parametrize(
    ("grid", "hidden", "smallest"), [((14, 14), 78, 16), ((8, 8), 26, 5), ((1, 9), 4, 4)]
)
def test_a_thousand_masks_hide_their_share_in_whole_blocks(grid, hidden, smallest) -> None:
    draw, same = random.Random(1), random.Random(1)
    seen = set()
    for _ in range(1000):
        mask = beit.block_mask(draw, grid, hidden, smallest)
        assert len(mask) == len(set(mask)) == hidden
        assert all(0 <= patch < grid[0] * grid[1] for patch in mask)
        # The same blocks, whole: the last alone may reach further than the mask.
        covered: set[int] = set()
        while len(covered) < hidden:
            before = set(covered)
            most = max(smallest, hidden - len(covered))
            top, left, height, width = beit.draw_block(same, grid, smallest, most)
            assert height * width >= smallest
            for row in range(top, top + height):
                covered |= {row * grid[1] + left + column for column in range(width)}
        assert before < set(mask) <= covered
        seen.add(tuple(sorted(mask)))
    assert len(seen) > (900 if grid[0] > 1 else 5)


def test_the_default_block_is_the_paper_s_on_its_grid_and_smaller_on_small_ones() -> None:
    sizes = {
        patches: beit._smallest_block(None, patches, round(0.4 * patches))
        for patches in (4, 16, 64, 196, 576)
    }
    assert sizes == {4: 1, 16: 1, 64: 5, 196: 16, 576: 16}


def test_every_image_of_a_batch_hides_equally_many() -> None:
    mask = make_method()._masks(64, random.Random(0))
    assert mask.sum(1).tolist() == [10] * 64  # 40 % of 24
    assert len({tuple(row.tolist()) for row in mask}) > 32


def test_a_uniform_guess_among_8192_costs_their_logarithm() -> None:
    method = make_method(tokenizer={**DVAE, "vocab_size": 8192})
    torch.nn.init.zeros_(method.head.weight)
    loss = method({"images": some_images()})["loss"].item()
    assert loss == pytest.approx(9.010913, abs=1e-5)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_it_begins_at_about_the_logarithm(model: str) -> None:
    method = make_method(make_encoder(model=model), {**DVAE, "vocab_size": 512})
    loss = method({"images": some_images(16)})["loss"].item()
    assert loss == pytest.approx(math.log(512), abs=0.1)


def test_the_loss_equals_a_slow_transcription() -> None:
    method, images = make_method().eval(), some_images()
    torch.manual_seed(9)
    loss = method({"images": images})["loss"].item()
    torch.manual_seed(9)
    draw = random.Random(int(torch.randint(2**62, ())))
    token_ids = method.tokenizer.token_ids(images)
    per_image = []
    for number in range(4):
        hidden = beit.block_mask(draw, (4, 6), 10, 2)
        mask = torch.tensor([[patch in hidden for patch in range(24)]])
        image = images[number : number + 1]
        tokens = method.encoder.masked_tokens(image, mask, method.mask_token)[0, 1:]
        costs = []
        for patch in hidden:
            scores = method.head(method.norm(tokens[patch])).tolist()
            total = sum(math.exp(score) for score in scores)
            costs.append(-math.log(math.exp(scores[token_ids[number, patch]]) / total))
        per_image.append(sum(costs) / len(costs))
    # The mean over images of each image's mean: batches may be accumulated.
    assert method.divisible and loss == pytest.approx(sum(per_image) / 4, rel=1e-5)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_other_names_for_the_codes_change_no_loss(name: str) -> None:
    method, images = make_method(tokenizer=TOKENIZERS[name]), some_images()
    torch.manual_seed(1)
    before, old_ids = method({"images": images})["loss"], method.tokenizer.token_ids(images)
    order = torch.randperm(32)
    tokenizer = method.tokenizer
    with torch.no_grad():
        if name == "dvae":
            last = tokenizer.encoder[-1]
            for weights in (last.weight, last.bias, tokenizer.codebook.weight):
                weights.copy_(weights[order])
        else:
            tokenizer.codebook.copy_(tokenizer.codebook[order])
        torch.manual_seed(1)
        assert abs(method({"images": images})["loss"] - before) > 1e-3
        method.head.weight.copy_(method.head.weight[order])
        method.head.bias.copy_(method.head.bias[order])
    torch.manual_seed(1)
    torch.testing.assert_close(method({"images": images})["loss"], before)
    assert torch.equal(order[tokenizer.token_ids(images)], old_ids)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_half_precision_stays_near_full(name: str) -> None:
    method, images = make_method(tokenizer=TOKENIZERS[name]), some_images()
    losses, prepared = [], []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(method({"images": images})["loss"])
            prepared.append(method.tokenizer({"images": images})["loss"])
    assert losses[1].dtype == prepared[1].dtype == torch.float32
    torch.testing.assert_close(losses[0], losses[1], atol=0.05, rtol=0)
    torch.testing.assert_close(prepared[0], prepared[1], atol=0.05, rtol=0)


MODELS = ["vit_tiny_patch16_224", "beit_base_patch16_224", "beitv2_base_patch16_224"]


@pytest.mark.parametrize("model", [*MODELS, "vit_base_patch16_reg4_gap_256"])
def test_an_empty_mask_is_the_plain_forward(model: str) -> None:
    encoder, images = make_encoder(model=model).eval(), some_images()
    plain = encoder(images)[0]
    assert plain.shape[1] == encoder.prefix_tokens + 24
    nothing = torch.zeros(4, 24, dtype=torch.bool)
    torch.testing.assert_close(encoder.masked_tokens(images, nothing, torch.ones(32)), plain)
    one = nothing.clone()
    one[:, 3] = True
    assert not torch.allclose(encoder.masked_tokens(images, one, torch.ones(32)), plain, atol=1e-3)
    torch.testing.assert_close(encoder(images)[0], plain)  # nothing was left behind


@pytest.mark.parametrize("model", MODELS)
def test_hidden_patches_are_not_seen(model: str) -> None:
    encoder, images = make_encoder(model=model).eval(), some_images(1)
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[0, 7] = True  # the second of the second row
    other = images.clone()
    other[:, :, 8:16, 8:16] = 0
    first, second = (encoder.masked_tokens(one, mask, torch.zeros(32)) for one in (images, other))
    assert torch.equal(first, second)
    assert not torch.allclose(encoder(images)[0], encoder(other)[0], atol=1e-3)


@torch.no_grad()
def test_it_equals_beit_of_the_same_weights() -> None:
    torch.manual_seed(2)
    config = BeitConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=32,
        use_mask_token=True,
        use_absolute_position_embeddings=False,
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
        layer_norm_eps=1e-6,
        use_mean_pooling=True,
        attn_implementation="eager",
    )
    theirs = BeitForMaskedImageModeling(config).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.2)
    encoder = make_encoder((32, 32), model="beit_base_patch16_224")
    method = make_method(encoder).eval()
    backbone, embeddings = encoder.backbone, theirs.beit.embeddings
    backbone.cls_token.copy_(embeddings.cls_token)
    backbone.patch_embed.proj.load_state_dict(embeddings.patch_embeddings.projection.state_dict())
    for given, taken in zip(theirs.beit.layers, backbone.blocks, strict=True):
        attention = given.attention
        rows = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        taken.attn.qkv.weight.copy_(torch.cat(rows))
        taken.attn.q_bias.copy_(attention.q_proj.bias)
        taken.attn.v_bias.copy_(attention.v_proj.bias)
        table = given.relative_position_bias.relative_position_bias_table
        taken.attn.relative_position_bias_table.copy_(table)
        taken.attn.proj.load_state_dict(attention.o_proj.state_dict())
        taken.norm1.load_state_dict(given.layernorm_before.state_dict())
        taken.norm2.load_state_dict(given.layernorm_after.state_dict())
        taken.mlp.fc1.load_state_dict(given.mlp.fc1.state_dict())
        taken.mlp.fc2.load_state_dict(given.mlp.fc2.state_dict())
        taken.gamma_1.copy_(given.lambda_1)
        taken.gamma_2.copy_(given.lambda_2)
    method.mask_token.copy_(embeddings.mask_token.flatten())
    method.norm.load_state_dict(theirs.layernorm.state_dict())
    method.head.load_state_dict(theirs.lm_head.state_dict())

    images = some_images(size=(32, 32))
    mask = method._masks(4, random.Random(0))
    token_ids = method.tokenizer.token_ids(images)
    pixels = encoder.normalise(images)
    features = theirs.beit(pixels, bool_masked_pos=mask).last_hidden_state
    tokens = encoder.masked_tokens(images, mask, method.mask_token)
    torch.testing.assert_close(tokens, features, atol=1e-5, rtol=1e-5)
    expected = theirs(pixels, bool_masked_pos=mask, labels=token_ids[mask])
    logits = method._hidden_logits(images, mask)
    torch.testing.assert_close(logits, expected.logits[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(F.cross_entropy(logits, token_ids[mask]), expected.loss)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_all_learns_but_the_tokenizer(name: str, model: str) -> None:
    method = make_method(make_encoder(model=model), TOKENIZERS[name]).train()
    before = {key: value.clone() for key, value in method.tokenizer.state_dict().items()}
    average = MovingAverage(method, decay=0.9)
    optimizer = build_optimizer(method, Optim(lr=0.1, weight_decay=0.5))
    for step in range(1, 4):
        method({"images": some_images()})["loss"].backward()
        optimizer.step()
        average.update(step)
        method.after_step(step)
        idle = {key for key, p in method.named_parameters() if p.grad is None}
        optimizer.zero_grad()
    unread = {f"encoder.backbone.fc_norm.{part}" for part in ("weight", "bias")}
    frozen = {f"tokenizer.{key}" for key, _ in method.tokenizer.named_parameters()}
    assert idle == frozen | (unread if model.startswith("beit") else set())
    for key, value in method.tokenizer.state_dict().items():
        assert torch.equal(value, before[key])
        if f"tokenizer.{key}" in average.shadow:
            assert torch.equal(average.shadow[f"tokenizer.{key}"], value)
    assert not any(module.training for module in method.tokenizer.modules())
    assert method.encoder.training


def test_relative_positions_are_not_decayed() -> None:
    method = make_method(make_encoder(model="beit_base_patch16_224"))
    tables = [p for name, p in method.named_parameters() if "relative_position" in name]
    groups = build_optimizer(method, Optim(weight_decay=0.1)).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(tables) == 2 and all(decays[id(table)] == 0 for table in tables)
    assert decays[id(method.head.weight)] == 0.1 and decays[id(method.mask_token)] == 0


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_pictures_show_the_guess_and_the_truth_as_the_tokenizer_draws_them(name: str) -> None:
    method, images = make_method(tokenizer=TOKENIZERS[name]).eval(), some_images()
    before = torch.get_rng_state()
    pictures = method.pictures(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert pictures.shape == (4, 4, 3, 32, 48) and pictures.dtype == torch.uint8
    assert torch.equal(method.pictures(images), pictures)
    masked, _, decoded, original = pictures.unbind(1)
    token_ids = method.tokenizer.token_ids(images)
    assert torch.equal(original, images)
    assert torch.equal(decoded, method.tokenizer.decode(token_ids))
    hidden = (masked == 127).all(1)
    assert hidden.float().mean().item() == pytest.approx(10 / 24)
    assert torch.equal(masked[:, 1][~hidden], images[:, 1][~hidden])
    mask = method._masks(4, random.Random(0))
    method._hidden_logits = lambda images, mask: F.one_hot(token_ids[mask], 32)  # always right
    assert torch.equal(method.pictures(images)[:, 1], decoded)
    wrong = (token_ids + 1) % 32
    method._hidden_logits = lambda images, mask: F.one_hot(wrong[mask], 32)
    guess = method.tokenizer.decode(torch.where(mask, wrong, token_ids))
    assert torch.equal(method.pictures(images)[:, 1], guess)


def recipe(shapes: Path, tokenizer) -> PretrainRecipe:
    return PretrainRecipe.model_validate(
        {
            "data": {"train": shapes / "captions_train.json", "scale": 1.0},
            "image": {"height": 32, "width": 32},
            "encoder": VIT,
            "method": {"name": "beit", "tokenizer": tokenizer},
            "loop": {"epochs": 2, "batch_size": 16, "ema": 0.9, "workers": 0},
        }
    )


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_the_tokenizer_is_trained_first_and_kept(shapes: Path, tmp_path: Path, name: str) -> None:
    pretrain.run(recipe(shapes, TOKENIZERS[name]), tmp_path)
    first, _ = load_checkpoint(tmp_path / "visual_tokenizer" / "last.safetensors")
    whole, _ = load_checkpoint(tmp_path / "last.safetensors")
    trained = {key.removeprefix("objective."): v for key, v in first.items() if "objective" in key}
    assert trained
    for key, value in trained.items():
        assert torch.equal(whole[f"objective.tokenizer.{key}"], value)
    rows = (tmp_path / "visual_tokenizer" / "log.jsonl").read_text().splitlines()
    assert len(rows) == 6 and 1 <= json.loads(rows[-1])["perplexity"] <= 32
    if name == "dvae":
        assert json.loads(rows[-1])["temperature"] == pytest.approx(0.0625 ** (5 / 6))
    assert (tmp_path / "pictures.png").exists()


def test_another_recipe_does_not_go_on_with_the_tokenizer(shapes: Path, tmp_path: Path) -> None:
    pretrain.run(recipe(shapes, DVAE), tmp_path)
    (tmp_path / "last.safetensors").unlink()  # as though it had been killed before the first
    with pytest.raises(CheckpointError, match=r"holds a run of another recipe .method"):
        pretrain.run(recipe(shapes, {**DVAE, "lr": 0.01}), tmp_path)
    pretrain.run(recipe(shapes, DVAE), tmp_path)
    assert (tmp_path / "last.safetensors").exists()


def test_a_smallest_block_larger_than_the_mask_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"min_block = 11, but method.mask_ratio hides 10 patches"
    ):
        make_method(min_block=11)
    assert make_method(min_block=10)._min_block == 10


@pytest.mark.parametrize(("ratio", "hidden"), [(0.99, 24), (0.01, 0)])
def test_a_ratio_that_leaves_nothing_says_so(ratio: float, hidden: int) -> None:
    message = f"of 24 patches leaves {24 - hidden} visible and {hidden} masked"
    with pytest.raises(ConfigError, match=message):
        make_method(mask_ratio=ratio)


def test_encoders_without_patches_are_refused() -> None:
    module, config = variants.parse("encoders", {"name": "timm_cnn"})
    with pytest.raises(ConfigError, match=r'take \[encoder\] name = "timm_vit"'):
        make_method(module.Encoder(config, (32, 32)))


def test_an_unknown_tokenizer_names_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match="no visual_tokenizers called 'vqgan'; there are dvae, vq"
    ):
        make_method(tokenizer={"name": "vqgan"})
    with pytest.raises(ConfigError, match=r"visual_tokenizers/dvae: unknown key 'codes'"):
        make_method(tokenizer={**DVAE, "codes": 3})
