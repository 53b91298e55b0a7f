"""The reference beam search: golden values, brute force, and the server's own search."""

from itertools import product

import numpy as np
import pytest
import torch
from histories import scripted

from exports.manifest import Generation
from serving.beam import beam_search as serving_beam_search
from serving.group import BeamParams
from trainer.decoding import beam_search, nucleus, sample

BOS, EOS = 0, 1


class Scripted:
    """A StepModel over `script(image, history) -> log_probs (V,)`.

    Its caches are the histories themselves, so a wrong gather changes the answer.
    """

    bos_id = BOS

    def __init__(self, script, vocab_size, *, eos_id=EOS, max_length=32):
        self.script, self.vocab_size = script, vocab_size
        self.eos_id, self.max_length = eos_id, max_length

    def start(self, images):
        return [(int(image), ()) for image in images[:, 0, 0, 0]]

    def step(self, state, token_ids, beam_index, top_k):
        state = [
            (state[parent][0], (*state[parent][1], token))
            for token, parent in zip(token_ids, beam_index, strict=True)
        ]
        log_probs = np.stack([self.script(image, history) for image, history in state])
        ids = np.argsort(-log_probs, axis=1, kind="stable")[:, :top_k]
        return state, np.take_along_axis(log_probs, ids, axis=1), ids


def numbered(count):
    images = np.zeros((count, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return images


def script_of(seed, vocab_size, *, eos_bonus=0.0, coarse=False):
    def script(image, history):
        draw = np.random.default_rng([seed, image, len(history), *history[-2:]])
        logits = 2 * draw.standard_normal(vocab_size)
        logits[EOS] += eos_bonus
        log_probs = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
        return np.rint(log_probs) if coarse else log_probs  # whole numbers: many ties

    return script


@pytest.mark.parametrize(("beams", "expected"), [(1, -3.16296), (2, -3.15580), (5, -3.05349)])
def test_the_golden_markov_chain(beams: int, expected: float) -> None:
    chain = np.log(np.random.default_rng(3).dirichlet(np.full(5, 0.6), (4, 5))).astype(np.float32)
    model = Scripted(
        lambda _, history: chain[len(history) - 1, history[-1]], 5, eos_id=99, max_length=32
    )
    generation = Generation(
        num_beams=beams, num_captions=1, max_new_tokens=4, min_new_tokens=0, length_penalty=0.0
    )
    best = beam_search(model, numbered(1), generation)[0][0]
    assert best.log_prob == pytest.approx(expected, abs=1e-5)
    if beams == 5:
        assert best.token_ids == (1, 1, 0, 1)


@pytest.mark.parametrize("seed", range(8))
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all(seed: int) -> None:
    vocab_size, longest = 4, 3
    script = script_of(seed, vocab_size)
    model = Scripted(script, vocab_size)
    best = max(
        sum(float(script(0, (BOS, *ids[:place]))[ids[place]]) for place in range(len(ids)))
        / len(ids)
        for length in range(1, longest + 1)
        for ids in product(range(vocab_size), repeat=length)
        if EOS not in ids[:-1] and (ids[-1] == EOS or length == longest)
    )
    generation = Generation(
        num_beams=vocab_size**longest, max_new_tokens=longest, min_new_tokens=0, length_penalty=1.0
    )
    assert beam_search(model, numbered(1), generation)[0][0].score == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("seed", range(120))
def test_serving_finds_the_same_token_for_token(seed: int) -> None:
    draw = np.random.default_rng(seed)
    vocab_size = int(draw.integers(4, 30))
    beams = int(draw.choice([1, 2, 3, 4, 5]))
    longest = int(draw.integers(1, 9))
    generation = Generation(
        num_beams=beams,
        num_captions=beams,
        max_new_tokens=longest,
        min_new_tokens=int(draw.integers(0, longest + 1)),
        length_penalty=float(draw.choice([-0.5, 0.0, 0.6, 1.0, 2.0])),
        no_repeat_ngram_size=int(draw.choice([0, 0, 1, 2, 3])),
    )
    prefix = tuple(draw.integers(2, vocab_size, size=draw.integers(0, 3)).tolist())
    script = script_of(
        seed, vocab_size, eos_bonus=float(draw.choice([0, 2])), coarse=bool(draw.integers(2))
    )
    model = Scripted(script, vocab_size, max_length=int(draw.choice([8, 32])))
    images = numbered(3)
    ours = beam_search(model, images, generation, prefix)
    params = BeamParams(**generation.model_dump(), prefix_ids=prefix)
    theirs = serving_beam_search(
        scripted(script, vocab_size, max_length=model.max_length), [params] * 3
    )
    for first, second in zip(ours, theirs, strict=True):
        assert [h.token_ids for h in first] == [h.token_ids for h in second]
        assert [h.score for h in first] == pytest.approx([h.score for h in second], abs=1e-6)


def test_the_nucleus_is_the_fewest_tokens_that_reach_p() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.05, 0.35], [0.96, 0.02, 0.01, 0.01]])
    found = nucleus(probabilities, 0.9)
    assert torch.equal(found, torch.tensor([[0.1, 0.5, 0.0, 0.35], [0.96, 0.0, 0.0, 0.0]]))
    assert torch.equal(nucleus(probabilities, 1.0), probabilities)


def test_samples_stay_in_the_nucleus_and_follow_their_prefix(make_captioner) -> None:
    captioner = make_captioner()
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    torch.manual_seed(0)
    with torch.no_grad():
        memory = captioner.memory(images)
        token_ids, lengths = sample(
            captioner, memory, 50, max_new_tokens=3, top_p=0.5, prefix=(7, 9)
        )
        logits = captioner(images, token_ids[:, :-1])
    assert token_ids.shape == (100, 6) and (token_ids[:, 1:3] == torch.tensor([7, 9])).all()
    allowed = nucleus(logits.flatten(0, 1).softmax(-1), 0.5).view_as(logits) > 0
    for row, length in enumerate(lengths.tolist()):
        for place in range(3, length):
            assert allowed[row, place - 1, token_ids[row, place]]
    assert len(token_ids[:50, 3].unique()) < 20  # of 40
