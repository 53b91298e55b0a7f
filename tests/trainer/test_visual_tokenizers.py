"""Visual tokenizers: their losses, what they learn, and that their codes stay in use."""

import math
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trainer import variants
from trainer.errors import ConfigError
from trainer.optim import Optim, build_optimizer, learning_rate
from trainer.stages.shapecaps import scene
from trainer.visual_tokenizers import dvae
from trainer.visual_tokenizers._tokenizer import perplexity, scaled, unscaled

TEACHER = {
    "name": "timm_vit",
    "model": "vit_tiny_patch16_224",
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
}
CNN = {"name": "timm_cnn", "model": "tf_efficientnet_lite0"}
TABLES = {"dvae": {"name": "dvae"}, "vq_kd": {"name": "vq_kd", "teacher": TEACHER}}
SMALL = {"width": 16, "blocks": 1, "vocab_size": 12}


def make(name: str, *, size=(32, 48), grid=(4, 6), steps=10, **keys):
    torch.manual_seed(0)
    module, config = variants.parse("visual_tokenizers", {**TABLES[name], **SMALL, **keys})
    return module.Tokenizer(config, size, grid, steps)


@pytest.fixture(scope="module")
def drawings() -> torch.Tensor:
    """160 ShapeCaps drawings (n, 3, 32, 32)."""
    draw = random.Random(0)
    pixels = np.stack([np.asarray(scene(draw, 32)[0]) for _ in range(160)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def trained(tokenizer, images, *, steps: int, lr: float):
    """Returns the tokenizer, trained on batches of 16, and what it said at each step."""
    optim = Optim(lr=lr)
    optimizer, said = build_optimizer(tokenizer.train(), optim), []
    for step in range(steps):
        torch.manual_seed(step)
        losses = tokenizer({"images": images[torch.randperm(len(images))[:16]]})
        losses["loss"].backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, optim)
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokenizer.after_step(step + 1)
        said.append({key: value.item() for key, value in losses.items()})
    return tokenizer.eval(), said


def psnr(images: torch.Tensor, others: torch.Tensor) -> float:
    return -10 * math.log10((images - others.float()).square().mean().item() / 255**2)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_patch_has_one_id_and_always_the_same(name: str) -> None:
    tokenizer = make(name).eval()
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    token_ids = tokenizer.token_ids(images)
    assert token_ids.shape == (3, 24) and token_ids.dtype == torch.int64
    assert token_ids.min() >= 0 and token_ids.max() < 12
    assert len(token_ids.unique()) > 2
    torch.manual_seed(1)
    assert torch.equal(tokenizer.token_ids(images), token_ids)
    assert torch.equal(tokenizer.token_ids(images[1:2])[0], token_ids[1])
    pictures = tokenizer.decode(token_ids)
    assert pictures.shape == images.shape and pictures.dtype == torch.uint8


@pytest.mark.parametrize("name", sorted(TABLES))
@pytest.mark.parametrize(("size", "grid"), [((42, 28), (3, 2)), ((32, 48), (2, 6))])
def test_patches_may_have_any_size(name: str, size, grid) -> None:
    keys = {} if name == "dvae" else {"teacher": CNN}
    tokenizer = make(name, size=size, grid=grid, **keys)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    assert tokenizer.token_ids(images).shape == (2, grid[0] * grid[1])
    assert tokenizer.decode(tokenizer.token_ids(images)).shape == images.shape
    assert torch.isfinite(tokenizer({"images": images})["loss"])


def test_perplexity_counts_the_codes_in_use() -> None:
    assert perplexity(torch.zeros(3, 5, dtype=torch.int64), 8).item() == pytest.approx(1)
    assert perplexity(torch.arange(8).repeat(3, 2), 8).item() == pytest.approx(8)
    assert perplexity(torch.tensor([[2, 5]]), 8).item() == pytest.approx(2)
    half, quarter = 0.5 * math.log(2), 0.25 * math.log(4)
    assert perplexity(torch.tensor([[0, 0, 1, 2]]), 8).item() == pytest.approx(
        math.exp(half + 2 * quarter)
    )


def test_pixels_are_scaled_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert scaled(pixels).min() == -1 and scaled(pixels).max() == 1
    assert torch.equal(unscaled(scaled(pixels)), pixels)
    assert unscaled(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_dvae_s_divergences_have_their_analytic_values() -> None:
    def divergence(shares):
        return dvae.from_uniform(torch.tensor(shares).log()).tolist()

    assert divergence([[0.25] * 4, [0.5, 0.5, 1e-30, 1e-30]]) == pytest.approx(
        [0, math.log(2)], abs=1e-6
    )
    with torch.no_grad():
        tokenizer = make("dvae", vocab_size=64)
        tokenizer.encoder[-1].weight.zero_()
        tokenizer.encoder[-1].bias.zero_()
        losses = tokenizer({"images": torch.zeros(2, 3, 32, 48, dtype=torch.uint8)})
        assert losses["kl"].item() == pytest.approx(0, abs=1e-5)
        assert losses["usage"].item() == pytest.approx(0, abs=1e-5)
        tokenizer.encoder[-1].bias[5] = 1e3  # certain, and always the same
        losses = tokenizer({"images": torch.zeros(2, 3, 32, 48, dtype=torch.uint8)})
        assert losses["kl"].item() == pytest.approx(math.log(64))
        assert losses["usage"].item() == pytest.approx(math.log(64))
        assert losses["perplexity"].item() == pytest.approx(1)


def test_dvae_s_loss_equals_a_slow_transcription() -> None:
    tokenizer = make("dvae", kl_weight=0.1, usage_weight=0.3)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    tokenizer.temperature.fill_(0.5)
    torch.manual_seed(4)
    losses = tokenizer({"images": images})
    torch.manual_seed(4)
    logits = tokenizer._logits(scaled(images)).detach()
    noise = -torch.empty(2, 24, 12).exponential_().log()
    codes, kl, mean = torch.zeros(2, 24, 16), 0.0, [0.0] * 12
    for image in range(2):
        for patch in range(24):
            scores = logits[image, patch].tolist()
            q = [math.exp(s - max(scores)) for s in scores]
            q = [value / sum(q) for value in q]
            kl += sum(value * math.log(value * 12) for value in q if value) / 48
            mean = [total + value / 48 for total, value in zip(mean, q, strict=True)]
            noisy = [
                (s + g) / 0.5 for s, g in zip(scores, noise[image, patch].tolist(), strict=True)
            ]
            y = [math.exp(value - max(noisy)) for value in noisy]
            for code, value in enumerate(y):
                codes[image, patch] += value / sum(y) * tokenizer.codebook.weight[code].detach()
    decoded = tokenizer.decoder(codes.transpose(1, 2).reshape(2, 16, 4, 6))
    error = (decoded - scaled(images)).square().mean().item()
    usage = sum(value * math.log(value * 12) for value in mean)
    assert losses["loss"].item() == pytest.approx(error + 0.1 * kl + 0.3 * usage, rel=1e-4)
    assert losses["psnr"].item() == pytest.approx(10 * math.log10(4 / error), rel=1e-4)


def test_dvae_survives_certainty() -> None:
    tokenizer = make("dvae")
    with torch.no_grad():
        tokenizer.encoder[-1].bias[3] = 1e4
    tokenizer({"images": torch.zeros(1, 3, 32, 48, dtype=torch.uint8)})["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in tokenizer.parameters())


def test_the_temperature_falls_exponentially_and_is_kept() -> None:
    tokenizer = make("dvae", steps=8)
    fallen = [tokenizer.temperature.item()]
    for step in range(1, 10):
        tokenizer.after_step(step)
        fallen.append(tokenizer.temperature.item())
    assert fallen[0] == 1 and fallen[8] == fallen[9] == 0.0625
    assert fallen[4] == pytest.approx(0.25)
    assert tokenizer.state_dict()["temperature"].item() == 0.0625


def test_dvae_learns_to_draw_and_uses_its_codes(drawings) -> None:
    fresh = make("dvae", size=(32, 32), grid=(8, 8), vocab_size=32, width=32).eval()
    before = psnr(drawings, fresh.reconstruct(drawings))
    tokenizer = make("dvae", size=(32, 32), grid=(8, 8), vocab_size=32, width=32, steps=150)
    tokenizer, said = trained(tokenizer, drawings, steps=150, lr=5e-3)
    after = psnr(drawings, tokenizer.reconstruct(drawings))
    assert said[-1]["psnr"] > said[0]["psnr"] + 6
    assert after > before + 6
    # More than the best picture of one colour.
    assert after > psnr(drawings, drawings.float().mean((2, 3), keepdim=True)) + 3
    assert perplexity(tokenizer.token_ids(drawings), 32) > 32 / 4


def test_vq_kd_learns_its_teacher_and_uses_its_codes(drawings) -> None:
    tokenizer = make("vq_kd", size=(32, 32), grid=(4, 4), vocab_size=64, width=32)
    tokenizer, said = trained(tokenizer, drawings, steps=150, lr=3e-3)
    # More than the best answer that is the same everywhere.
    taught = tokenizer._taught(drawings)
    same = F.cosine_similarity(taught, taught.mean((0, 2, 3), keepdim=True), dim=1).mean().item()
    assert said[0]["cosine"] < 0.5
    assert said[-1]["cosine"] > same + 0.2 * (1 - same)
    assert perplexity(tokenizer.token_ids(drawings), 64) > 64 / 4


def test_vq_kd_s_loss_equals_a_slow_transcription() -> None:
    tokenizer = make("vq_kd", commitment=0.5)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    losses = tokenizer({"images": images})
    features = tokenizer.encoder(scaled(images)).detach()
    codes = torch.zeros_like(features)
    distances, token_ids = [], []
    for image in range(2):
        for row in range(4):
            for column in range(6):
                h = features[image, :, row, column]
                h = h / h.norm()
                squares = [(h - code).square().sum().item() for code in tokenizer.codebook]
                distances.append(min(squares))
                token_ids.append(squares.index(min(squares)))
                codes[image, :, row, column] = tokenizer.codebook[token_ids[-1]]
    rebuilt = tokenizer.decoder(codes)
    taught = tokenizer.teacher(images)[0][:, 1:]  # (B, N, D), the grid is the teacher's own
    cosines = [
        torch.dot(rebuilt[i, :, n // 6, n % 6], taught[i, n]).item()
        / (rebuilt[i, :, n // 6, n % 6].norm() * taught[i, n].norm()).item()
        for i in range(2)
        for n in range(24)
    ]
    expected = 1 - sum(cosines) / 48 + 0.5 * sum(distances) / 48
    assert tokenizer.token_ids(images).flatten().tolist() == token_ids
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_a_teacher_s_map_is_resampled_to_the_grid() -> None:
    tokenizer = make("vq_kd", size=(64, 96), grid=(8, 12), teacher=CNN)
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    image_tokens = tokenizer.teacher(images)[0]
    features = tokenizer.teacher.feature_map(images)
    assert torch.equal(features.flatten(2).transpose(1, 2), image_tokens)
    taught = tokenizer._taught(images)
    assert features.shape[2:] == (2, 3) and taught.shape == (1, tokenizer.teacher.width, 8, 12)
    # The middle of four cells is their mean, and corners are the cells' own.
    torch.testing.assert_close(taught[:, :, 0, 0], features[:, :, 0, 0])
    torch.testing.assert_close(taught[:, :, 7, 11], features[:, :, 1, 2])


def test_gradient_passes_the_codes_and_spares_the_teacher() -> None:
    tokenizer = make("vq_kd", commitment=0.0).train()
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    assert not any(module.training for module in tokenizer.teacher.modules())
    tokenizer({"images": images})["loss"].backward()
    idle = {name for name, p in tokenizer.named_parameters() if p.grad is None}
    assert idle == {f"teacher.{name}" for name, _ in tokenizer.teacher.named_parameters()}
    assert tokenizer.encoder[0].weight.grad.abs().sum() > 0  # only past the codes


def test_the_codes_follow_their_features() -> None:
    tokenizer = make("vq_kd", code_width=3, vocab_size=4, decay=0.9, revive_below=0.0)
    tokenizer.codebook.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]]))
    features = F.normalize(torch.tensor([[[0.9, 0.2, 0.1], [0.8, -0.1, 0.3], [0.1, 1, 0]]]), dim=2)
    tokenizer._assigned.append((features, tokenizer._nearest(features)))
    tokenizer.after_step(1)
    mean = (features[0, 0] + features[0, 1]) / (features[0, 0] + features[0, 1]).norm()
    first = 0.9 * torch.tensor([1.0, 0, 0]) + 0.1 * mean
    second = 0.9 * torch.tensor([0.0, 1, 0]) + 0.1 * features[0, 2]
    torch.testing.assert_close(tokenizer.codebook[0], first / first.norm())
    torch.testing.assert_close(tokenizer.codebook[1], second / second.norm())
    assert tokenizer.codebook[2].tolist() == [0, 0, 1] and tokenizer.codebook[3, 0] == -1
    torch.testing.assert_close(tokenizer.counts, torch.tensor([0.2, 0.1, 0, 0]))


def test_idle_codes_start_anew_at_features() -> None:
    tokenizer = make("vq_kd", vocab_size=8).train()
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    random_codes = tokenizer.codebook.clone()
    features = tokenizer._features(images).detach().flatten(0, 1)

    def known(code):
        return (features - code).square().sum(1).min() < 1e-10

    tokenizer({"images": images})
    tokenizer.after_step(1)
    assert all(known(code) for code in tokenizer.codebook)  # at the first step all of them
    even = 48 / 8
    with torch.no_grad():
        tokenizer.codebook.copy_(random_codes)
        tokenizer.counts.fill_(even)
        tokenizer.counts[3] = 0.05 * even
    tokenizer({"images": images})
    tokenizer.after_step(2)
    assert [bool(known(code)) for code in tokenizer.codebook] == [
        number == 3 for number in range(8)
    ]
    assert tokenizer.counts[3] > 0.1 * even


def test_evaluating_moves_no_code() -> None:
    tokenizer = make("vq_kd").eval()
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    tokenizer({"images": images})
    assert not tokenizer._assigned


def test_like_codes_have_like_colours() -> None:
    tokenizer = make("vq_kd", vocab_size=6, code_width=3)
    near = torch.tensor(
        [[1.0, 0, 0], [1, 0.01, 0], [0, 1, 0], [0, 1, 0.01], [0, 0, 1], [0.5, 0.5, 0.7]]
    )
    tokenizer.codebook.copy_(F.normalize(near, dim=1))
    colours = tokenizer.decode(torch.arange(24).remainder(6)[None])[0, :, ::8, ::8].flatten(1).T
    colours = colours[:6].int()

    def apart(first, second):
        return (colours[first] - colours[second]).abs().sum()

    assert apart(0, 1) < 20 and apart(2, 3) < 20 and apart(0, 2) > 100


def test_vq_kd_needs_a_teacher() -> None:
    with pytest.raises(ConfigError, match=r"visual_tokenizers/vq_kd: teacher: field required"):
        variants.parse("visual_tokenizers", {"name": "vq_kd"})
