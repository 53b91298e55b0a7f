"""Image-text contrast: CLIP's loss, the paper's with queue and soft targets, and what is kept."""

import copy
import math

import pytest
import torch
from pairs import batch_of, make_dataset, make_matcher, objective_of, some_captions
from torch.nn import functional as F

from trainer.methods.clip import clip_loss, same_captions
from trainer.objectives._pairs import Labels, belongs, caption_keys

QUEUED = {"name": "itc", "momentum": 0.9, "queue": 6}


def embedded(captioner, batch) -> tuple[torch.Tensor, torch.Tensor]:
    images = captioner.matcher.embed_images(captioner.encoder(batch["images"])[1])
    captions = captioner.matcher.embed_captions(
        captioner.decoder, batch["token_ids"], batch["lengths"]
    )
    return images, captions


def stir(objective) -> None:
    """Moves the captioner, so that it and its copies differ; the temperature stays."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in objective.captioner.parameters():
            if parameter.ndim:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("repeated", [False, True])
def test_without_momentum_it_is_clip_s(repeated: bool) -> None:
    captions = some_captions(6)
    if repeated:
        captions[4] = captions[1]
    dataset = make_dataset(captions)
    objective = objective_of({"name": "itc", "momentum": 0}, dataset).train()
    batch = batch_of(dataset)
    images, texts = embedded(objective.captioner, batch)
    expected = clip_loss(images @ texts.T / 0.07, same_captions(batch["token_ids"]))
    assert objective(batch)["loss"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_with_alpha_0_it_is_clip_s_with_a_queue() -> None:
    captions = some_captions(8, 2)
    captions[5] = (captions[0][1], captions[5][0])  # in the queue, and right for the first image
    dataset = make_dataset(captions, each=2)
    objective = objective_of({**QUEUED, "alpha": 0.0}, dataset).train()
    contrast = objective.contrast
    objective(batch_of(dataset, 4, 5, 6, 7))
    objective.after_step(1)
    stir(objective)
    batch = batch_of(dataset, 0, 1, 2, 4)  # the last is in the queue too
    found = objective(batch)["loss"].item()
    with torch.no_grad():
        images, texts = embedded(objective.captioner, batch)
        keys, text_keys = embedded(contrast.towers, batch)
        all_images = [*keys, *contrast.image_queue]
        all_texts = [*text_keys, *contrast.caption_queue.flatten(0, 1)]
    whose = [0, 1, 2, 4, 4, 5, 6, 7, None, None]
    words = [
        [tuple(ids) for ids in dataset[(0, i)]["token_ids"]] if i is not None else [(), ()]
        for i in whose
    ]
    total = 0.0
    for row in range(4):
        right = [
            image == whose[row] or text in words[row]
            for image, texts_ in zip(whose, words, strict=True)
            for text in texts_
        ]
        logits = torch.stack([images[row] @ text for text in all_texts]) / 0.07
        total -= sum(logits.log_softmax(0)[right]).item() / sum(right) / 4 / 2
        for caption in range(2):
            right = [
                image == whose[row] or words[row][caption] in texts_
                for image, texts_ in zip(whose, words, strict=True)
            ]
            logits = torch.stack([texts[2 * row + caption] @ image for image in all_images]) / 0.07
            total -= sum(logits.log_softmax(0)[right]).item() / sum(right) / 8 / 2
    assert found == pytest.approx(total, abs=1e-4)


def test_soft_targets_are_what_the_copies_say() -> None:
    dataset = make_dataset(some_captions(8))
    objective = objective_of({**QUEUED, "alpha": 0.4}, dataset).train()
    contrast = objective.contrast
    contrast.seen.fill_(4)  # half of an epoch
    stir(objective)
    batch = batch_of(dataset, 0, 1, 2)
    with torch.no_grad():
        images, texts = embedded(objective.captioner, batch)
        keys, text_keys = embedded(contrast.towers, batch)
        all_images = torch.cat([keys, contrast.image_queue])
        all_texts = torch.cat([text_keys, contrast.caption_queue.flatten(0, 1)])
        total = 0.0
        for queries, mine, others in ((images, keys, all_texts), (texts, text_keys, all_images)):
            for row in range(3):
                target = 0.2 * (mine[row] @ others.T / 0.07).softmax(0)
                target[row] += 0.8
                said = (queries[row] @ others.T / 0.07).log_softmax(0)
                total -= (target * said).sum().item() / 3 / 2
    assert objective(batch)["loss"].item() == pytest.approx(total, abs=1e-4)


def test_alpha_rises_over_the_first_epoch() -> None:
    dataset = make_dataset(some_captions(8))
    objective = objective_of({**QUEUED, "alpha": 0.4}, dataset).train()
    found = []
    for step in range(6):
        found.append(objective.contrast._alpha())
        objective(batch_of(dataset, 0, 1))
        objective.after_step(step + 1)
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_the_queue_holds_the_last_keys_and_whose_they_are() -> None:
    dataset = make_dataset(some_captions(8, 2), each=2)
    objective = objective_of(QUEUED, dataset).train()
    images, captions, indices = [], [], []
    for step, chosen in enumerate([(0, 1, 2, 3), (4, 5, 6, 7), (2, 0, 7, 1)]):
        batch = batch_of(dataset, *chosen)
        objective(batch)
        keys = embedded(objective.contrast.towers, batch)
        images += [*keys[0]]
        captions += [*keys[1].unflatten(0, (4, 2))]
        indices += chosen
        objective.after_step(step + 1)
    contrast = objective.contrast
    assert contrast.pointer.item() == 12 % 6
    assert contrast.queue_indices.tolist() == indices[-6:]
    assert torch.allclose(contrast.image_queue, torch.stack(images[-6:]), atol=1e-6)
    assert torch.allclose(contrast.caption_queue, torch.stack(captions[-6:]), atol=1e-6)
    assert torch.equal(contrast.queue_keys[2:], Labels.of(batch).keys)


def test_a_batch_larger_than_the_queue_leaves_its_last_keys() -> None:
    dataset = make_dataset(some_captions(8))
    objective = objective_of({**QUEUED, "queue": 3}, dataset).train()
    objective(batch_of(dataset))
    objective.after_step(1)
    assert sorted(objective.contrast.queue_indices.tolist()) == [5, 6, 7]


def test_the_copies_follow_in_closed_form_and_carry_no_gradient() -> None:
    dataset = make_dataset(some_captions(4))
    objective = objective_of(QUEUED, dataset).train()
    start = copy.deepcopy(objective.contrast.towers)
    with torch.no_grad():
        for parameter in objective.captioner.parameters():
            parameter.add_(1.0)
    for step in range(5):
        objective.after_step(step + 1)
    towers = objective.contrast.towers
    for name in ("encoder", "decoder"):
        for mine, old, new in zip(
            getattr(towers, name).parameters(),
            getattr(start, name).parameters(),
            getattr(objective.captioner, name).parameters(),
            strict=True,
        ):
            assert torch.allclose(mine, 0.9**5 * old + (1 - 0.9**5) * new, atol=1e-5)
    objective(batch_of(dataset))["loss"].backward()
    assert all(p.grad is None for p in towers.parameters())
    assert objective.captioner.matcher.temperature.grad is not None


def test_evaluation_neither_queues_nor_asks_the_queue() -> None:
    dataset = make_dataset(some_captions(6))
    objective = objective_of(QUEUED, dataset)
    stir(objective)
    batch = batch_of(dataset)
    plain = objective_of({"name": "itc", "momentum": 0}, dataset, objective.captioner).eval()
    assert objective.eval()(batch)["loss"].item() == plain(batch)["loss"].item()
    assert not objective.contrast._new


def test_the_temperature_stays_within_its_bounds() -> None:
    objective = objective_of({"name": "itc", "momentum": 0}, make_dataset(some_captions(4)))
    temperature = objective.captioner.matcher.temperature
    for value, bound in ((3.0, 0.5), (1e-6, 0.001)):
        with torch.no_grad():
            temperature.fill_(value)
        objective.after_step(1)
        assert temperature.item() == pytest.approx(bound)


def test_equal_embeddings_cost_the_log_of_their_number() -> None:
    captioner = make_matcher()
    with torch.no_grad():
        captioner.matcher.image_projection.weight.zero_()
        captioner.matcher.text_projection.weight.zero_()
    dataset = make_dataset(some_captions(8))
    objective = objective_of({"name": "itc", "momentum": 0}, dataset, captioner)
    assert objective(batch_of(dataset))["loss"].item() == pytest.approx(math.log(8), abs=1e-5)


def test_captions_belong_to_their_image_and_to_those_that_have_the_same() -> None:
    images = Labels(torch.tensor([3, 5]), torch.tensor([[10, 11], [12, 13]]))
    captions = Labels(torch.tensor([5, 9, 3]), torch.tensor([[12, 99], [11, 50], [7, 10]]))
    assert belongs(images, captions).tolist() == [
        [False, False, True, False, True, True],
        [True, True, False, False, False, False],
    ]


def test_keys_tell_captions_apart_whatever_their_padding() -> None:
    torch.manual_seed(0)
    token_ids = torch.randint(3, 40, (2000, 8)).unique(dim=0)
    lengths = torch.full((len(token_ids),), 8)
    keys = caption_keys(token_ids, lengths)
    assert len(keys.unique()) == len(token_ids)
    wider = F.pad(token_ids, (0, 3), value=0)
    assert torch.equal(caption_keys(wider, lengths), keys)
    assert not torch.equal(caption_keys(wider, lengths + 1), keys)
