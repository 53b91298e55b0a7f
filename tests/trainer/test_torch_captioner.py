"""Encoders, the decoder's two ways of running, and the whole captioner."""

import pytest
import torch
from tiny_captioner import CNN, TEXT, VIT

from trainer import variants
from trainer.errors import ConfigError
from trainer.optim import Optim, build_optimizer, freeze_prefixes

ENCODERS = {"timm_cnn": CNN, "timm_vit": VIT}


def test_the_table_of_encoders_is_complete() -> None:
    assert sorted(ENCODERS) == variants.names("encoders")


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_encoder_gives_tokens_and_pooled(name: str) -> None:
    module, config = variants.parse("encoders", ENCODERS[name])
    encoder = module.Encoder(config, (64, 96)).eval()
    image_tokens, pooled = encoder(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    assert image_tokens.shape[::2] == (2, encoder.width)
    assert pooled.shape == (2, encoder.width)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_encoder_takes_what_it_made_of_images(make_captioner, name: str) -> None:
    encoder = make_captioner(encoder=ENCODERS[name]).encoder
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    seen = encoder(images)
    for found, expected in zip(encoder(encoder.encoded(images)), seen, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_steps_with_a_cache_equal_the_whole_sequence(make_captioner, name: str) -> None:
    captioner = make_captioner(encoder=ENCODERS[name])
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    token_ids = torch.randint(3, TEXT.vocab_size, (6, 7))  # three captions an image
    with torch.no_grad():
        whole = captioner(images, token_ids)
        memory, past = captioner.memory(images), captioner.empty_cache(6)
        for position in range(7):
            logits, past = captioner.step(token_ids[:, position], position, past, memory)
            torch.testing.assert_close(logits, whole[:, position], atol=2e-4, rtol=0)


def test_what_follows_does_not_change_what_stands_before(make_captioner) -> None:
    captioner = make_captioner()
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    token_ids = torch.randint(3, TEXT.vocab_size, (1, 8))
    other = token_ids.clone()
    other[:, 5:] = TEXT.pad_id
    with torch.no_grad():
        torch.testing.assert_close(
            captioner(images, token_ids)[:, :5], captioner(images, other)[:, :5]
        )


def test_the_image_matters(make_captioner) -> None:
    captioner = make_captioner()
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    token_ids = torch.tensor([[1, 5, 6]]).expand(2, -1)
    with torch.no_grad():
        first, second = captioner(images, token_ids)
    assert (first - second).abs().max() > 1e-3


def test_a_run_may_start_from_smaller_pictures() -> None:
    module, config = variants.parse("bridges", {"name": "cross_attention", "layers": 0})
    sizes = {"encoder_width": 8, "decoder_width": 4}
    old, new = (module.Bridge(config, tokens=n, **sizes) for n in (4, 9))
    with torch.no_grad():  # a ramp over the 2 x 2 grid, rightwards and downwards
        old.position.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 4, 1).expand(1, 4, 4))
    new.load_state_dict(old.state_dict())
    grid = new.position[0, :, 0].detach().view(3, 3)
    assert grid[1, 1] == pytest.approx(1.5)  # the middle is the mean
    assert torch.all(grid.diff(dim=1) > 0) and torch.all(grid.diff(dim=0) > 0)
    with pytest.raises(RuntimeError, match="size mismatch for position"):
        module.Bridge(config, tokens=6, **sizes).load_state_dict(old.state_dict())


def test_an_unknown_model_and_an_unknown_prefix_are_config_errors(make_captioner) -> None:
    module, config = variants.parse("encoders", {**CNN, "model": "resnot50"})
    with pytest.raises(ConfigError, match="resnot50"):
        module.Encoder(config, (32, 32))
    with pytest.raises(ConfigError, match=r"'encodr' names no parameter.*decoder"):
        freeze_prefixes(make_captioner(), ["encodr"])
    with pytest.raises(ConfigError, match=r"scales: 'encodr' names no parameter; .*like encoder\."):
        build_optimizer(make_captioner(), Optim(scales={"encodr": 0.1}))


def test_a_prefix_is_a_whole_name() -> None:
    blocks = torch.nn.ModuleDict({str(n): torch.nn.Linear(2, 2) for n in range(12)})
    freeze_prefixes(blocks, ["1"])
    frozen = {name for name, p in blocks.named_parameters() if not p.requires_grad}
    assert frozen == {"1.weight", "1.bias"}
