"""The objective of prompts: what it trains, what each image can change, and that it learns."""

import pytest
import torch
from few_shots import SHOT_TOKENS, SHOTS, captions, gated_captioner, pictures
from test_loop import log, recipe
from tiny_captioner import TEXT
from torch import nn

from exports.text import TextSpec
from trainer.data import read_examples
from trainer.dataset import CaptionDataset, blocks, padded
from trainer.errors import ConfigError
from trainer.features import nearest_others, pooled_features
from trainer.objectives.flamingo import Config, Objective, interleaved_logits
from trainer.optim import Optim, build_optimizer
from trainer.photos import load_all
from trainer.stages import finetune
from trainer.transforms import Augment, Transform

END = SHOTS * SHOT_TOKENS


@pytest.fixture
def batch():
    """Two images with two captions each, each behind three examples."""
    shot_ids, shot_lengths = blocks(captions(4 * SHOTS, 9), TEXT.pad_id, SHOT_TOKENS)
    token_ids, lengths = padded(captions(4, 8, seed=3), TEXT.pad_id)
    return {
        "images": pictures(2),
        "shot_images": pictures(2, SHOTS, seed=4),
        "shot_token_ids": shot_ids.view(4, SHOTS, SHOT_TOKENS),
        "shot_lengths": shot_lengths.view(4, SHOTS),
        "token_ids": token_ids,
        "lengths": lengths,
    }


def test_a_caption_that_is_too_long_still_ends() -> None:
    ids, lengths = blocks([[1, 5, 6, 7, 8, 2], [1, 5, 2]], 0, 4)
    assert ids.tolist() == [[1, 5, 6, 2], [1, 5, 2, 0]]
    assert lengths.tolist() == [4, 3]


def test_examples_are_other_images_of_the_training_set_with_captions_of_one_place(shapes) -> None:
    examples = read_examples(shapes / "captions_train.json")[:12]
    captioner = gated_captioner()
    pixels = load_all(examples, captioner.image)
    words = FixedIds(
        {
            c: [3 + 5 * n + p for p in (place, 0)]
            for n, e in enumerate(examples)
            for place, c in enumerate(e.captions)
        }
    )
    dataset = CaptionDataset(
        examples,
        pixels,
        words,
        TextSpec(**{**TEXT.model_dump(), "vocab_size": 99}),
        captions=3,
        transform=Transform(Augment(), (32, 48)),
        seed=0,
    )
    data = Objective(Config(), captioner, dataset).data(dataset)
    nearest = nearest_others(pooled_features(captioner.encoder, pixels), SHOTS)
    item = data[4, 7]
    others = nearest[7].tolist()
    assert 7 not in others and len(set(others)) == SHOTS
    assert torch.equal(item["image"], dataset[4, 7]["image"])
    for image, other in zip(item["shot_images"], others, strict=True):
        assert torch.equal(image, dataset[4, other]["image"])
    batch = data.collate([item, data[4, 2]])
    assert batch["shot_token_ids"].shape == (6, SHOTS, SHOT_TOKENS)
    places = [ids[1] - 3 - 5 * 7 for ids in item["token_ids"]]
    assert len(set(places)) == 3
    for row, place in enumerate(places):
        for shot, other in enumerate(others):
            found = batch["shot_token_ids"][row, shot].tolist()
            assert found == [TEXT.bos_id, 3 + 5 * other + place, 3 + 5 * other, TEXT.eos_id, 0, 0]
    assert batch["shot_lengths"].eq(4).all()


class FixedIds:
    """A tokenizer that knows some texts."""

    def __init__(self, token_ids: dict[str, list[int]]) -> None:
        self.encode = token_ids.__getitem__


def test_at_first_it_is_the_language_model_whatever_the_images(batch) -> None:
    captioner = gated_captioner(gate=0.0)
    with torch.no_grad():
        first = interleaved_logits(captioner, batch)
        other = {"images": pictures(2, seed=8), "shot_images": pictures(2, SHOTS, seed=9)}
        assert torch.equal(interleaved_logits(captioner, batch | other), first)
        captioner.decoder.gated = nn.ModuleList()
        assert torch.equal(interleaved_logits(captioner, batch), first)


def test_a_step_changes_the_bridge_and_the_gated_layers_alone(batch) -> None:
    captioner = gated_captioner(gate=0.0)
    objective = Objective(Config(frozen=("encoder", "decoder.model")), captioner, None).train()
    optimizer = build_optimizer(objective, Optim())
    before = {name: value.clone() for name, value in captioner.state_dict().items()}
    objective(batch)["loss"].backward()
    optimizer.step()
    after = captioner.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert all(name.startswith(("bridge.", "decoder.gated.")) for name in changed)
    gates = {name for name in after if name.endswith("_gate")}
    assert len(gates) == 4 and gates <= changed


@pytest.mark.parametrize("image", range(SHOTS + 1))
def test_an_image_is_seen_by_its_own_text_alone(batch, image: int) -> None:
    """Through self-attention later text would know of it too; here that adds nothing."""
    captioner = gated_captioner()
    with torch.no_grad():
        for layer in captioner.decoder.model.transformer.h:
            layer.attn.c_proj.weight.zero_()
    first, second = logits_with_another(captioner, batch, image)
    differs = (first != second).any(-1)
    own = torch.zeros(first.shape[1], dtype=torch.bool)
    own[image * SHOT_TOKENS : (image + 1) * SHOT_TOKENS if image < SHOTS else None] = True
    assert torch.equal(differs, own.expand(4, -1))


@pytest.mark.parametrize("image", range(SHOTS + 1))
def test_an_image_changes_nothing_that_stands_before_it(batch, image: int) -> None:
    first, second = logits_with_another(gated_captioner(), batch, image)
    start = image * SHOT_TOKENS
    assert torch.equal(first[:, :start], second[:, :start])
    assert (first[:, start] - second[:, start]).abs().max() > 1e-3
    if image < SHOTS:  # what its caption says of it is read by the query
        assert (first[:, END:] - second[:, END:]).abs().max() > 1e-4


def logits_with_another(captioner, batch, image: int):
    shot_images, images = batch["shot_images"].clone(), batch["images"]
    if image < SHOTS:
        shot_images[:, image] = pictures(2, seed=7)
    else:
        images = pictures(2, seed=7)
    with torch.no_grad():
        return (
            interleaved_logits(captioner, batch),
            interleaved_logits(captioner, {**batch, "images": images, "shot_images": shot_images}),
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_equals_a_slow_transcription(batch, smoothing: float) -> None:
    captioner = gated_captioner()
    config = Config(label_smoothing=smoothing, shot_weight=0.3)
    with torch.no_grad():
        found = Objective(config, captioner, None).eval()(batch)
        log_probs = interleaved_logits(captioner, batch).log_softmax(-1)
    query, shots = [], []
    for row in range(4):
        texts = [*batch["shot_token_ids"][row], batch["token_ids"][row]]
        lengths = [*batch["shot_lengths"][row].tolist(), batch["lengths"][row].item()]
        for number, (ids, length) in enumerate(zip(texts, lengths, strict=True)):
            for position in range(length - 1):
                here = log_probs[row, number * SHOT_TOKENS + position]
                term = -(1 - smoothing) * here[ids[position + 1]] - smoothing * here.mean()
                (query if number == SHOTS else shots).append(term.item())
    expected = sum(query) / len(query), sum(shots) / len(shots)
    assert found["query_loss"].item() == pytest.approx(expected[0], abs=1e-4)
    assert found["shot_loss"].item() == pytest.approx(expected[1], abs=1e-4)
    assert found["loss"].item() == pytest.approx(expected[0] + 0.3 * expected[1], abs=1e-4)


def test_padding_changes_nothing(batch) -> None:
    objective = Objective(Config(), gated_captioner(), None).eval()
    filled = batch["shot_token_ids"].clone()
    filled[torch.arange(SHOT_TOKENS) >= batch["shot_lengths"].unsqueeze(2)] = 17
    wider = nn.functional.pad(batch["token_ids"], (0, 3), value=TEXT.pad_id)
    with torch.no_grad():
        first = objective(batch)["loss"]
        second = objective({**batch, "shot_token_ids": filled, "token_ids": wider})["loss"]
    torch.testing.assert_close(first, second)


def test_it_learns_sixteen_pairs_by_heart_and_looks_at_the_image() -> None:
    captioner = gated_captioner(gate=0.0)
    config = Config(label_smoothing=0.0, frozen=("encoder",))
    objective = Objective(config, captioner, None).train()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    texts = captions(16, SHOT_TOKENS)
    images, (token_ids, lengths) = pictures(16), blocks(texts, TEXT.pad_id, SHOT_TOKENS)
    draw = torch.Generator().manual_seed(0)
    for _ in range(150):
        # Other examples at every step: the caption cannot be told from them.
        shots = torch.stack([torch.randperm(15, generator=draw)[:SHOTS] for _ in range(16)])
        shots += (shots >= torch.arange(16)[:, None]).long()
        batch = {
            "images": images,
            "shot_images": images[shots],
            "shot_token_ids": token_ids[shots],
            "shot_lengths": lengths[shots],
            "token_ids": token_ids,
            "lengths": lengths,
        }
        optimizer.zero_grad()
        objective(batch)["loss"].backward()
        optimizer.step()
    objective.eval()
    with torch.no_grad():
        assert objective(batch)["token_accuracy"] == 1
        assert objective({**batch, "images": images.roll(1, 0)})["token_accuracy"] < 0.6


def test_without_examples_it_is_the_objective_lm(shapes, tmp_path) -> None:
    bridge = {"name": "perceiver", "latents": 4, "layers": 1, "heads": 2}
    for name in ("lm", "flamingo"):
        changes = {"bridge": bridge, "objective": {"name": name}, "loop": {"epochs": 1}}
        finetune.run(recipe(shapes, **changes), tmp_path / name)
    assert log(tmp_path / "lm") == log(tmp_path / "flamingo")


def test_it_needs_gated_layers(make_captioner) -> None:
    with pytest.raises(ConfigError, match="perceiver"):
        Objective(Config(), make_captioner(), None)
