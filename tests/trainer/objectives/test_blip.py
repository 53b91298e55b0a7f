"""BLIP: three losses of one encoding, what they share, and the prompt."""

import copy

import pytest
import torch
from pairs import batch_of, make_dataset, make_matcher, objective_of, some_captions
from tiny_captioner import TEXT
from torch.nn import functional as F

from trainer.errors import ConfigError

ALONE = {"itc": 0.0, "itm": 0.0, "lm": 0.0, "momentum": 0, "label_smoothing": 0.0}


def loss_of(table, dataset, batch) -> float:
    torch.manual_seed(2)  # of the negatives
    return objective_of(table, dataset).train()(batch)["loss"].item()


@pytest.mark.parametrize("part", ["itc", "itm", "lm"])
def test_each_part_is_the_objective_of_that_name(part: str) -> None:
    dataset = make_dataset(some_captions(5, 2), each=2)
    batch = batch_of(dataset)
    alone = {"itc": {"momentum": 0}, "itm": {}, "lm": {"label_smoothing": 0.0}}[part]
    expected = loss_of({"name": part, **alone}, dataset, batch)
    found = loss_of({"name": "blip", **ALONE, part: 1.0}, dataset, batch)
    assert found == pytest.approx(expected, abs=1e-6)
    assert loss_of({"name": "blip", **ALONE, part: 0.5}, dataset, batch) == pytest.approx(found / 2)


def test_images_are_encoded_once_and_the_parts_add_up() -> None:
    dataset = make_dataset(some_captions(5, 2), each=2)
    objective = objective_of({"name": "blip"}, dataset).train()
    encodings = []
    objective.captioner.encoder.register_forward_hook(lambda *_: encodings.append(1))
    figures = objective(batch_of(dataset))
    assert len(encodings) == 1
    parts = sum(figures[name].item() for name in ("itc", "itm", "lm"))
    assert figures["loss"].item() == pytest.approx(parts, abs=1e-5)
    figures["loss"].backward()
    captioner = objective.captioner
    for name, parameter in captioner.named_parameters():
        unused = "mask_token" in name or "encoder.backbone.head" in name
        assert (parameter.grad is None) == unused, name


def test_reading_and_telling_share_all_but_self_attention() -> None:
    decoder = make_matcher().decoder
    reads = {p.untyped_storage().data_ptr() for p in decoder.reading_attention.parameters()}
    tells = {p.untyped_storage().data_ptr() for p in decoder.model.parameters()}
    assert len(reads) == len(list(decoder.reading_attention.parameters()))
    assert not reads & tells
    batch = batch_of(make_dataset(some_captions(2)))
    captioner = make_matcher()
    memory = captioner.memory(batch["images"])
    captioner.decoder.read(batch["token_ids"], batch["lengths"], memory).sum().backward()
    for name, parameter in captioner.decoder.model.named_parameters():
        own = ".attention." in name or ".cls." in f".{name}"
        tied = "decoder.bias" in name or name.endswith("predictions.bias")
        assert (parameter.grad is None) == (own or tied), name


def test_tied_weights_stay_tied_in_the_copies() -> None:
    objective = objective_of({"name": "blip"}, make_dataset(some_captions(4)))
    for decoder in (objective.captioner.decoder, objective.contrast.towers.decoder):
        embedding = decoder.model.bert.embeddings.word_embeddings.weight
        head = decoder.model.cls.predictions.decoder.weight
        assert embedding.data_ptr() == head.data_ptr()
    copied = copy.deepcopy(objective)
    ours, theirs = objective.state_dict(), copied.state_dict()
    assert ours.keys() == theirs.keys()


def test_the_prompt_is_given_and_not_learnt() -> None:
    dataset = make_dataset(some_captions(3))
    captioner = make_matcher()
    table = {"name": "blip", **ALONE, "lm": 1.0, "prompt": "xyz"}
    objective = objective_of(table, dataset, captioner)
    assert len(objective.prompt_ids) == 3
    batch, kept = batch_of(dataset), {}

    def keep(module, given, logits):
        logits.retain_grad()
        kept["ids"], kept["logits"] = given[0], logits

    captioner.decoder.register_forward_hook(keep)
    loss = objective(batch)["loss"]
    loss.backward()
    assert kept["ids"][:, 1:4].tolist() == [list(objective.prompt_ids)] * 3
    slopes = kept["logits"].grad.abs().sum(2)
    assert (slopes[:, :3] == 0).all()  # what would tell the prompt
    assert (slopes[:, 3] > 0).all()  # the first word behind it
    logits = kept["logits"].detach()
    terms = [
        F.cross_entropy(logits[row, place + 3], batch["token_ids"][row, place + 1]).item()
        for row, length in enumerate(batch["lengths"].tolist())
        for place in range(min(length - 1, TEXT.max_length - 4))
    ]
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt is 10 tokens long, .* 12: no word fits"):
        objective_of({"name": "blip", "prompt": "xyzxyzxyzx"}, make_dataset(some_captions(2)))
