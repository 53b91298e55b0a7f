"""MAE: its masks, its loss, and equality with another implementation."""

import math

import pytest
import torch
from pretraining import VIT, make_encoder, some_images
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from trainer import variants
from trainer.errors import ConfigError
from trainer.methods import mae
from trainer.methods._masked import patchify, unpatchify
from trainer.methods._method import Setting

SMALL = {"decoder_width": 32, "decoder_layers": 1, "decoder_heads": 2}


def make_method(size=(32, 48), encoder=None, **keys):
    torch.manual_seed(0)
    config = mae.Config.model_validate(SMALL | keys)
    return mae.Method(config, encoder or make_encoder(size), Setting(8, 4, 10))


def masks(count: int, patches: int = 196, visible: int = 49) -> torch.Tensor:
    """True where a patch is hidden, (count, patches)."""
    ids_keep, ids_hide = mae.shuffled(torch.rand(count, patches), visible)
    assert ids_keep.shape == (count, visible) and ids_hide.shape == (count, patches - visible)
    mask = torch.zeros(count, patches, dtype=torch.bool).scatter_(1, ids_hide, True)
    assert not mask.gather(1, ids_keep).any()
    return mask


def test_the_paper_s_masks_have_49_and_147_patches() -> None:
    assert masks(3).sum(1).tolist() == [147, 147, 147]
    assert make_method((224, 224), make_encoder((224, 224), patch_size=16))._visible == 49


def test_images_have_masks_of_their_own() -> None:
    assert len({tuple(row.tolist()) for row in masks(64)}) == 64
    # Every patch is hidden three times of four: 196 counts, each within 5 deviations.
    counts = masks(4000).sum(0)
    assert (counts - 3000).abs().max() < 5 * math.sqrt(4000 * 0.75 * 0.25)


@torch.no_grad()
def test_the_decoder_knows_places_and_no_order() -> None:
    method = make_method().eval()
    tokens = torch.randn(2, 1 + 6, 32)  # a class token and six patches
    ids_keep, ids_hide = mae.shuffled(torch.rand(2, 24), 6)
    pixels = method.decoder(tokens, ids_keep, ids_hide)
    seen, guessed = torch.randperm(6), torch.randperm(18)
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, seen]], dim=1)
    moved = method.decoder(shuffled, ids_keep[:, seen], ids_hide[:, guessed])
    torch.testing.assert_close(moved, pixels[:, guessed])
    elsewhere = method.decoder(tokens, ids_keep[:, seen], ids_hide)
    assert not torch.allclose(elsewhere, pixels, atol=1e-3)


def test_patches_are_cut_row_by_row_and_put_back() -> None:
    images = some_images()
    patches = patchify(images, (8, 8))
    assert patches.shape == (4, 24, 192)
    second_row = images[1, :, 8:16, 0:8].permute(1, 2, 0).flatten()
    assert torch.equal(patches[1, 6], second_row)
    assert torch.equal(unpatchify(patches, (4, 6), (8, 8)), images)


def test_some_patches_are_cut_out_of_each_image() -> None:
    images, ids = some_images(), torch.rand(4, 24).argsort(1)[:, :5]
    column = make_encoder().cut_out(images, ids)
    assert column.shape == (4, 3, 5 * 8, 8)
    expected = patchify(images, (8, 8)).gather(1, ids[:, :, None].expand(-1, -1, 192))
    assert torch.equal(patchify(column, (8, 8)), expected)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(make_encoder().cut_out(last, ids), column)


@pytest.mark.parametrize(("patch", "expected"), [(16, 0.998698), (4, 0.979167)])
def test_predicting_zero_costs_what_the_unbiased_variance_says(patch, expected) -> None:
    encoder = make_encoder((32, 32), patch_size=patch)
    method = make_method(encoder=encoder, mask_ratio=0.5)
    torch.nn.init.zeros_(method.decoder.to_pixels.weight)
    losses = method({"images": some_images(size=(32, 32))})
    assert losses["loss"].item() == pytest.approx(expected, abs=2e-6)
    assert losses["of_chance"].item() == pytest.approx(1.0)


def slow_loss(pixels, prediction, ids_hide, patch, norm_pix) -> float:
    """The paper's section 3, image by image and patch by patch."""
    errors = []
    columns = pixels.shape[3] // patch
    for image, predicted, hidden in zip(pixels, prediction, ids_hide.tolist(), strict=True):
        for number, guess in zip(hidden, predicted.tolist(), strict=True):
            top, left = patch * (number // columns), patch * (number % columns)
            values = [
                image[channel, top + y, left + x].item()
                for y in range(patch)
                for x in range(patch)
                for channel in range(3)
            ]
            if norm_pix:
                mean = sum(values) / len(values)
                variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
                values = [(v - mean) / math.sqrt(variance + 1e-6) for v in values]
            squares = [(p - v) ** 2 for p, v in zip(guess, values, strict=True)]
            errors.append(sum(squares) / len(squares))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_equals_a_slow_transcription(norm_pix: bool) -> None:
    method, images = make_method(norm_pix=norm_pix), some_images()
    torch.manual_seed(7)
    loss = method({"images": images})["loss"].item()
    torch.manual_seed(7)
    ids_keep, ids_hide = mae.shuffled(torch.rand(4, 24), 6)
    tokens = method.encoder.visible_tokens(images, ids_keep)
    prediction = method.decoder(tokens, ids_keep, ids_hide)
    pixels = method.encoder.normalise(images)
    assert loss == pytest.approx(slow_loss(pixels, prediction, ids_hide, 8, norm_pix), rel=1e-5)


def test_visible_patches_have_no_part_in_the_loss(monkeypatch) -> None:
    method, images = make_method(), some_images()
    guess = torch.randn(4, 18, 192)
    monkeypatch.setattr(method, "_predict", lambda *given: guess)
    torch.manual_seed(3)
    ids_keep, ids_hide = mae.shuffled(torch.rand(4, 24), 6)
    losses = []
    for changed in (None, ids_keep, ids_hide):
        patches = patchify(images, (8, 8))
        if changed is not None:
            places = changed[:, :1, None].expand(-1, -1, 192)
            patches = patches.scatter(1, places, 255 - patches.gather(1, places))
        torch.manual_seed(3)
        losses.append(method({"images": unpatchify(patches, (4, 6), (8, 8))})["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_the_encoder_does_not_see_masked_patches() -> None:
    encoder = make_encoder().eval()
    ids_keep = torch.tensor([[5, 0, 13]])
    first = some_images(1)
    patches = patchify(some_images(1, seed=1), (8, 8))
    patches[0, ids_keep[0]] = patchify(first, (8, 8))[0, ids_keep[0]]
    second = unpatchify(patches, (4, 6), (8, 8))
    seen = [encoder.visible_tokens(images, ids_keep) for images in (first, second)]
    assert torch.equal(*seen) and seen[0].shape == (1, 4, 32)
    assert not torch.allclose(encoder(first)[0], encoder(second)[0], atol=1e-2)


@pytest.mark.parametrize(
    "model",
    [
        "vit_tiny_patch16_224",  # a class token
        "deit_tiny_distilled_patch16_224",  # two
        "vit_base_patch16_reg4_gap_256",  # registers alone, without positions
        "deit3_small_patch16_224",  # a class token without a position
        "vit_base_patch16_clip_224",  # a norm before the blocks
    ],
)
def test_all_patches_visible_is_the_plain_forward(model: str) -> None:
    encoder, images = make_encoder(model=model).eval(), some_images()
    plain = encoder(images)[0]
    ordered = torch.arange(24).expand(4, -1)
    torch.testing.assert_close(encoder.visible_tokens(images, ordered), plain)
    # In another order: attention does not know it, so tokens move with their patches.
    order = torch.rand(4, 24).argsort(1)
    moved = encoder.visible_tokens(images, order)
    prefix = encoder.prefix_tokens
    places = order[:, :, None].expand(-1, -1, 32)
    torch.testing.assert_close(moved[:, prefix:], plain[:, prefix:].gather(1, places))
    torch.testing.assert_close(moved[:, :prefix], plain[:, :prefix])
    torch.testing.assert_close(encoder(images)[0], plain)  # nothing was left behind


def test_a_quarter_of_the_patches_costs_about_a_quarter() -> None:
    module, config = variants.parse("encoders", {"name": "timm_vit", "model": VIT["model"]})
    encoder, images = module.Encoder(config, (224, 224)).eval(), some_images(1, (224, 224))
    counted = []
    for visible in (196, 49):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder.visible_tokens(images, torch.arange(visible)[None])
        counted.append(counter.get_total_flops())
    assert 0.22 < counted[1] / counted[0] < 0.3


def vit_mae() -> ViTMAEForPreTraining:
    torch.manual_seed(3)
    config = ViTMAEConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
        attn_implementation="eager",
    )
    model = ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def copy_blocks(theirs, ours) -> None:
    for given, taken in zip(theirs, ours, strict=True):
        state, attention = dict(taken.named_parameters()), given.attention
        for part in ("weight", "bias"):
            rows = [
                getattr(getattr(attention, name), part) for name in ("q_proj", "k_proj", "v_proj")
            ]
            state[f"attn.qkv.{part}"].copy_(torch.cat(rows))
            for mine, module in (
                ("attn.proj", attention.o_proj),
                ("norm1", given.layernorm_before),
                ("norm2", given.layernorm_after),
                ("mlp.fc1", given.mlp.fc1),
                ("mlp.fc2", given.mlp.fc2),
            ):
                state[f"{mine}.{part}"].copy_(getattr(module, part))


@torch.no_grad()
def test_it_equals_vit_mae_of_the_same_weights() -> None:
    theirs = vit_mae()
    method = make_method(
        encoder=make_encoder((32, 32)), decoder_layers=2, decoder_heads=4, decoder_width=32
    ).eval()
    backbone, embeddings = method.encoder.backbone, theirs.vit.embeddings
    backbone.cls_token.copy_(embeddings.cls_token)
    backbone.pos_embed.copy_(embeddings.position_embeddings)
    backbone.patch_embed.proj.load_state_dict(embeddings.patch_embeddings.projection.state_dict())
    copy_blocks(theirs.vit.layers, backbone.blocks)
    backbone.norm.load_state_dict(theirs.vit.layernorm.state_dict())
    decoder = method.decoder
    decoder.embed.load_state_dict(theirs.decoder.decoder_embed.state_dict())
    decoder.mask_token.copy_(theirs.decoder.mask_token.flatten())
    copy_blocks(theirs.decoder.decoder_layers, decoder.blocks)
    decoder.norm.load_state_dict(theirs.decoder.decoder_norm.state_dict())
    decoder.to_pixels.load_state_dict(theirs.decoder.decoder_pred.state_dict())
    theirs.decoder.decoder_pos_embed[:, 1:] = mae.sin_cos_positions((4, 4), 32)

    images = some_images(size=(32, 32))
    torch.manual_seed(5)
    noise = torch.rand(4, 16)
    expected = theirs(method.encoder.normalise(images), noise=noise)
    encoded = theirs.vit(method.encoder.normalise(images), noise=noise).last_hidden_state
    ids_keep, ids_hide = mae.shuffled(noise, 4)
    assert torch.equal(ids_hide.sort(1)[0], expected.mask.nonzero()[:, 1].view(4, 12))
    tokens = method.encoder.visible_tokens(images, ids_keep)
    torch.testing.assert_close(tokens, encoded, atol=1e-5, rtol=1e-5)
    prediction = decoder(tokens, ids_keep, ids_hide)
    theirs_hidden = expected.logits.gather(1, ids_hide[:, :, None].expand(-1, -1, 192))
    torch.testing.assert_close(prediction, theirs_hidden, atol=2e-5, rtol=1e-5)
    torch.manual_seed(5)
    assert method({"images": images})["loss"].item() == pytest.approx(
        expected.loss.item(), rel=1e-5
    )


def test_positions_are_vit_mae_s() -> None:
    theirs = ViTMAEForPreTraining(vit_mae().config).decoder
    theirs.initialize_weights(16)
    expected = theirs.decoder_pos_embed[0, 1:]
    torch.testing.assert_close(mae.sin_cos_positions((4, 4), 32), expected)


def test_every_weight_learns_and_the_decoder_is_kept() -> None:
    method = make_method()
    method({"images": some_images()})["loss"].backward()
    still = {name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == set()
    assert {"decoder.mask_token", "decoder.to_pixels.weight"} <= set(method.state_dict())


def test_the_loss_of_a_batch_is_the_mean_of_its_parts() -> None:
    method, images = make_method(mask_ratio=0.6).eval(), some_images(6)
    torch.manual_seed(4)
    whole = method({"images": images})["loss"]
    torch.manual_seed(4)  # the parts draw one after the other what the whole draws at once
    parts = [method({"images": part})["loss"] for part in images.split(3)]
    assert method.divisible
    torch.testing.assert_close(whole, sum(parts) / 2)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_pictures_show_what_is_seen_what_is_guessed_and_what_is_there(norm_pix: bool) -> None:
    method, images = make_method(norm_pix=norm_pix).eval(), some_images()
    # A decoder that says what is there, in the units of the loss.
    method.decoder.forward = lambda tokens, _, ids_hide: method._target(images, ids_hide)[0]
    before = torch.get_rng_state()
    pictures = method.pictures(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert pictures.shape == (4, 3, 3, 32, 48) and pictures.dtype == torch.uint8
    masked, reconstruction, original = pictures.unbind(1)
    assert torch.equal(original, images)
    assert (reconstruction.int() - images.int()).abs().max() <= 1
    grey = (masked == 127).all(1)
    assert grey.float().mean().item() == pytest.approx(0.75)
    assert torch.equal(masked[:, 0][~grey], images[:, 0][~grey])
    assert torch.equal(reconstruction[:, 0][~grey], images[:, 0][~grey])
    assert torch.equal(method.pictures(images), pictures)


def test_half_precision_stays_near_full() -> None:
    method, losses = make_method(), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(method({"images": some_images()})["loss"])
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[0], losses[1], atol=0.02, rtol=0)


def test_a_flat_patch_is_no_division_by_zero() -> None:
    method = make_method()
    losses = method({"images": torch.full((4, 3, 32, 48), 90, dtype=torch.uint8)})
    assert all(torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_all_or_no_patches_masked_is_refused_by_the_recipe(ratio: float) -> None:
    bound = "greater than 0" if ratio == 0 else "less than 1"
    with pytest.raises(ConfigError, match=rf"mask_ratio: input should be {bound} \(found"):
        variants.parse("methods", {"name": "mae", "mask_ratio": ratio})


@pytest.mark.parametrize(("ratio", "visible"), [(0.99, 0), (0.01, 24)])
def test_a_ratio_that_leaves_nothing_says_so(ratio: float, visible: int) -> None:
    message = f"of 24 patches leaves {visible} visible and {24 - visible} masked"
    with pytest.raises(ConfigError, match=message):
        make_method(mask_ratio=ratio)


def test_encoders_without_patches_are_refused() -> None:
    module, config = variants.parse("encoders", {"name": "timm_cnn"})
    with pytest.raises(ConfigError, match=r'take \[encoder\] name = "timm_vit"'):
        make_method(encoder=module.Encoder(config, (32, 32)))


@pytest.mark.parametrize("model", ["beit_base_patch16_224", "vit_small_patch16_rope_224"])
def test_encoders_that_need_every_patch_are_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="cannot leave patches out; take a plain vision"):
        make_method(encoder=make_encoder(model=model))


def test_patches_that_do_not_fill_the_image_are_refused() -> None:
    message = r"patches of \(8, 8\) pixels fill \(32, 48\) of an image of \(36, 48\)"
    with pytest.raises(ConfigError, match=message):
        make_method(encoder=make_encoder((36, 48)))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"decoder_heads = 5 does not divide .* = 32"):
        make_method(decoder_heads=5)
