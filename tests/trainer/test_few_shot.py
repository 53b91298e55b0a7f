"""Prompts: what they hide, that they may be computed once an image, and when there is no room."""

import pytest
import torch
from few_shots import LLAMA, SHOT_TOKENS, SHOTS, captions, gated_captioner, pictures
from tiny_captioner import GPT2, TEXT

from trainer.errors import ConfigError
from trainer.features import nearest_others
from trainer.few_shot import ShotIndex, hide_padding, own_image
from trainer.objectives.flamingo import interleaved_logits

LABELLED = pictures(9, seed=1)
CAPTIONS = captions(9, SHOT_TOKENS, seed=1)


def with_examples(decoder=GPT2, shots=SHOTS):
    captioner = gated_captioner(decoder)
    captioner.show_examples(LABELLED.permute(0, 2, 3, 1).numpy(), CAPTIONS, shots=shots)
    return captioner


def test_each_position_sees_the_tokens_of_its_own_image() -> None:
    found = own_image(8, 3, 2, images=3)[0]
    expected = torch.zeros(8, 6, dtype=torch.bool)
    expected[0:3, 0:2] = expected[3:6, 2:4] = expected[6:8, 4:6] = True
    assert torch.equal(found, expected)
    assert torch.equal(own_image(6, 3, 2)[0], expected[:6, :4])


def test_what_fills_up_an_example_is_hidden() -> None:
    found = hide_padding(torch.tensor([[3, 1], [2, 3]]), 3, behind=2)[:, 0, 0]
    hidden = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(found, torch.zeros(2, 8).masked_fill(hidden, float("-inf")))


def test_the_nearest_example_stands_last() -> None:
    pooled = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0], [-1.0, 0.1]])
    index = ShotIndex(
        pooled, torch.zeros(4, 2, 8), captions(4, 6), shots=2, shot_tokens=6, pad_id=TEXT.pad_id
    )
    assert index.nearest(torch.tensor([[0.3, 3.0], [5.0, 1.0]])).tolist() == [[1, 2], [0, 2]]


def test_what_all_features_share_and_how_they_are_stored_does_not_decide() -> None:
    draw = torch.Generator().manual_seed(0)
    pooled = torch.randn(30, 16, generator=draw)
    query = pooled + 0.01 * torch.randn(30, 16, generator=draw)
    for shift in (0.0, 100.0):  # all cosines are then above 0.999
        index = ShotIndex(
            pooled + shift,
            torch.zeros(30, 2, 8),
            captions(30, 6),
            shots=3,
            shot_tokens=6,
            pad_id=TEXT.pad_id,
        )
        for buffer in (index.mean, index.features):
            buffer.copy_(buffer.half().float())
        found = index.nearest(query + shift)
        assert found[:, -1].tolist() == list(range(30))


def test_an_image_of_the_training_set_is_not_its_own_example() -> None:
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    features[7] = 2 * features[8] + 0.01  # nearly the same direction
    found = nearest_others(features, 4).tolist()
    unit = torch.nn.functional.normalize((features - features.mean(0)).double(), dim=1)
    for row, others in enumerate(found):
        cosines = (unit @ unit[row]).tolist()
        ranked = sorted((i for i in range(60) if i != row), key=lambda i: cosines[i])
        assert others == ranked[-4:]
    assert (found[7][-1], found[8][-1]) == (8, 7)
    with pytest.raises(ConfigError, match="there are 60 images"):
        nearest_others(features, 60)


@pytest.mark.parametrize("decoder", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("shots", [1, SHOTS])
def test_a_prompt_read_once_equals_the_whole_sequence(decoder, shots: int) -> None:
    captioner = with_examples(decoder, shots)
    images = pictures(2, seed=2)
    token_ids = torch.randint(3, TEXT.vocab_size, (4, 7))  # two captions an image
    token_ids[:, 0] = TEXT.bos_id
    with torch.no_grad():
        memory = captioner.memory(images)
        assert captioner.examples is not None
        chosen = captioner.examples.nearest(captioner.encoder(images)[1])
        ids, lengths = captioner.examples.token_ids[chosen], captioner.examples.lengths[chosen]
        teacher_forced = captioner.decoder(token_ids, memory)
        past, stepped = captioner.empty_cache(4), []
        for position in range(7):
            logits, past = captioner.step(token_ids[:, position], position, past, memory)
            stepped.append(logits)
        batch = {
            "images": images,
            "shot_images": LABELLED[chosen],
            "shot_token_ids": ids.repeat_interleave(2, dim=0),
            "shot_lengths": lengths.repeat_interleave(2, dim=0),
            "token_ids": torch.cat([token_ids, token_ids[:, :1]], dim=1),
        }
        whole = interleaved_logits(gated_captioner(decoder), batch)[:, shots * SHOT_TOKENS :]
    assert (whole[0] - whole[2]).abs().max() > 0.1
    torch.testing.assert_close(teacher_forced, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(stepped, 1), whole, atol=1e-5, rtol=1e-5)


def test_what_stands_in_the_padding_changes_nothing() -> None:
    captioner, images = with_examples(), pictures(2, seed=2)
    index = captioner.examples
    assert index is not None
    token_ids = torch.tensor([[1, 5, 6, 7]]).expand(2, -1)
    with torch.no_grad():
        first = captioner(images, token_ids)
        padding = torch.arange(SHOT_TOKENS) >= index.lengths[:, None]
        assert padding.any()
        index.token_ids[padding] = 17
        assert torch.equal(captioner(images, token_ids), first)
        index.token_ids[:, 1] = 17  # a word of each caption
        assert (captioner(images, token_ids) - first).abs().max() > 1e-3


def test_room_and_images_are_asked_for() -> None:
    pixels = LABELLED.permute(0, 2, 3, 1).numpy()
    for room, shots, labelled in ((0, 1, 9), (SHOTS, 4, 9), (SHOTS, 3, 2)):
        captioner = gated_captioner(shots=room)
        message = f"{shots} examples .* room for {room} .* {labelled} labelled images"
        with pytest.raises(ConfigError, match=message):
            captioner.show_examples(pixels[:labelled], CAPTIONS[:labelled], shots=shots)
