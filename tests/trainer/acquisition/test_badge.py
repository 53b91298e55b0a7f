"""Gradients of the output head against autograd, and what is drawn by them."""

import numpy as np
import pytest
import torch
from pools import FakeSpeaker, acquisition, make_pool, some_features
from tiny_captioner import TEXT, decoder_table

from trainer import variants
from trainer.acquisition._head_gradients import _signs, head_gradients


def exact(captioner, memory, ids: list[int], begin: int) -> torch.Tensor:
    """The gradient (V, D) of the mean of -log p of the tokens from `begin` on."""
    head = captioner.decoder.model.get_output_embeddings()
    for parameter in captioner.parameters():
        parameter.requires_grad_(False)
    # An untied copy: what the embedding of tokens learns is none of the head's.
    weight = head.weight.detach().clone().requires_grad_()
    hook = head.register_forward_hook(
        lambda _, inputs, output: torch.nn.functional.linear(inputs[0], weight, head.bias)
    )
    try:
        logits = captioner.decoder(torch.tensor([ids[:-1]]), memory)[0]
    finally:
        hook.remove()
    labels = torch.tensor(ids[1:])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    losses[begin - 1 :].mean().backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("name", variants.names("decoders"))
@pytest.mark.parametrize("begin", [1, 3])
def test_gradients_are_those_of_autograd_projected(name: str, begin: int, make_captioner) -> None:
    captioner = make_captioner(decoder=decoder_table(name), sharpen=2)
    captions = [[1, 5, 9, 7, 2], [1, 4, 8, 2], [1, 30, 31, 32, 33, 2]]
    lengths = torch.tensor([5, 4, 6])
    token_ids = torch.zeros(3, 6, dtype=torch.long)
    for row, ids in enumerate(captions):
        token_ids[row, : len(ids)] = torch.tensor(ids)
    images = torch.randint(0, 256, (3, 3, 32, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        memory = captioner.memory(images)
    found = head_gradients(captioner, memory, token_ids, lengths, 64, begin=begin, seed=3)
    draw = torch.Generator().manual_seed(3)
    for row, ids in enumerate(captions):
        with torch.no_grad():
            own = captioner.memory(images[row : row + 1])
        gradient = exact(captioner, own, ids, begin)
        left = _signs(TEXT.vocab_size, 64, draw.manual_seed(3))
        right = _signs(gradient.shape[1], 64, draw)
        projected = torch.einsum("vw,vd,dw->w", left, gradient, right) / 64**0.5
        torch.testing.assert_close(found[row], projected, rtol=1e-3, atol=1e-5)


def test_a_wide_projection_keeps_lengths_and_distances(make_captioner) -> None:
    captioner = make_captioner()
    images = torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(0))
    captions = [[1, 5, 9, 7, 2], [1, 30, 31, 32, 2]]
    gradients = []
    for row, ids in enumerate(captions):
        with torch.no_grad():
            own = captioner.memory(images[row : row + 1])
        gradients.append(exact(captioner, own, ids, 1))
    with torch.no_grad():
        memory = captioner.memory(images)
    token_ids, lengths = torch.tensor(captions), torch.tensor([5, 5])
    found = head_gradients(captioner, memory, token_ids, lengths, 8192)
    for row, gradient in enumerate(gradients):
        assert float(found[row].norm() / gradient.norm()) == pytest.approx(1, abs=0.1)
    apart = (gradients[0] - gradients[1]).norm()
    assert float((found[0] - found[1]).norm() / apart) == pytest.approx(1, abs=0.1)


class Three(FakeSpeaker):
    """Gradients in three directions, by the row; the third is longest."""

    def gradients(self, rows, width):
        found = np.zeros((len(rows), width), np.float32)
        for place, row in enumerate(rows):
            found[place, row % 3] = 1 + row % 3
        return found


def test_picks_differ_in_what_they_would_change() -> None:
    for seed in range(10):
        pool = make_pool(some_features(30), speaker=Three(), seed=seed)
        picks = acquisition("badge", width=4).pick(pool, 3)
        assert picks[0].row % 3 == 2
        assert {pick.row % 3 for pick in picks} == {0, 1, 2}
        assert picks[0].score == pytest.approx(3)
    rows = [pick.row for pick in acquisition("badge", width=4).pick(pool, 30)]
    assert sorted(rows) == list(range(30))  # the rest have distance 0


def test_long_gradients_are_drawn_more_often() -> None:
    """Behind the first pick lie one of length 2 and one of length 1 in other directions."""

    class Lengths(FakeSpeaker):
        def gradients(self, rows, width):
            found = np.diag(np.array([9.0, 40.0, 1.0], np.float32))
            return found[:, :width]

    seconds = []
    for seed in range(300):
        pool = make_pool(some_features(3), speaker=Lengths(), seed=seed)
        first, second, _ = acquisition("badge", width=3).pick(pool, 3)
        assert first.row == 1
        seconds.append(second.row)
    # Squared distances to the first: 1681 and 1601.
    share = 1681 / (1681 + 1601)
    assert seconds.count(0) / 300 == pytest.approx(
        share, abs=4 * (share * (1 - share) / 300) ** 0.5
    )
