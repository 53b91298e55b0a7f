"""Beam search against brute force, a slow transcription of its rules, and transformers."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from histories import Histories, scripted

from serving.beam import Beams, Done, Hypothesis, beam_search
from serving.group import BeamParams

BOS = 0
EOS = 1
PLAIN = BeamParams(
    num_beams=4,
    num_captions=4,
    max_new_tokens=6,
    min_new_tokens=0,
    length_penalty=1.0,
    no_repeat_ngram_size=0,
)


def log_softmax(logits):
    return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).astype(np.float32)


def random_script(seed, vocab_size, *, eos_bonus=0.0, coarse=False):
    """Log-probabilities that depend on the image, the position and the last two tokens.

    Coarse ones are whole numbers, so that many candidates tie.
    """

    def script(image, history):
        rng = np.random.default_rng([seed, image, len(history), *history[-2:]])
        logits = 2.0 * rng.standard_normal(vocab_size)
        logits[EOS] += eos_bonus
        log_probs = log_softmax(logits)
        return np.rint(log_probs) if coarse else log_probs

    return script


def slow_beam_search(
    script: Callable[..., np.ndarray], image: int, vocab_size: int, max_length: int, p: BeamParams
) -> list[Hypothesis]:
    """One image, all of the vocabulary, one rule after the other."""
    beams = [(np.float32(0), p.prefix_ids)]
    start = len(p.prefix_ids)
    finished: list[Hypothesis] = []
    generated = 0
    while True:
        candidates = []
        for row, (total, tokens) in enumerate(beams):
            history = (BOS, *tokens)
            log_probs = script(image, history).copy()
            if generated < p.min_new_tokens:
                log_probs[EOS] = -np.inf
            size = p.no_repeat_ngram_size
            if size and len(history) >= size:
                seen = {history[i : i + size] for i in range(len(history) - size + 1)}
                for token in range(vocab_size):
                    if (*history[len(history) - size + 1 :], token) in seen:
                        log_probs[token] = -np.inf
            candidates += [
                (-(total + log_probs[token]), token, row)
                for token in range(vocab_size)
                if log_probs[token] > -np.inf
            ]
        generated += 1
        last = generated == p.max_new_tokens or 1 + start + generated == max_length
        norm = np.float32(float(generated) ** p.length_penalty)
        following = []
        for rank, (cost, token, row) in enumerate(sorted(candidates)[: 2 * p.num_beams]):
            tokens = (*beams[row][1], token)
            if rank < p.num_beams and (last or token == EOS):
                finished.append(Hypothesis(tokens, float(-cost / norm), float(-cost), generated))
            elif token != EOS:
                following.append((-cost, tokens))
        finished.sort(key=lambda hypothesis: -hypothesis.score)
        del finished[p.num_beams :]
        beams = following[: p.num_beams]
        full = len(finished) == p.num_beams
        if last or not beams or (full and finished[-1].score >= beams[0][0] / norm):
            return finished[: p.num_captions]


def random_params(rng, vocab_size, *, ngrams=(0, 0, 1, 2, 3), max_new=8):
    beams = int(rng.choice([1, 2, 3, 4, 5, 12]))
    longest = int(rng.integers(1, max_new + 1))
    return BeamParams(
        num_beams=beams,
        num_captions=int(rng.integers(1, beams + 1)),
        max_new_tokens=longest,
        min_new_tokens=int(rng.integers(0, longest + 1)),
        length_penalty=float(rng.choice([-0.5, 0.0, 0.6, 1.0, 2.0])),
        no_repeat_ngram_size=int(rng.choice(ngrams)),
        prefix_ids=tuple(rng.integers(2, vocab_size, size=rng.integers(0, 4)).tolist()),
    )


@pytest.fixture(scope="module")
def toy():
    """The Markov chain of the golden values: another transition matrix at each of four steps."""
    chain = np.log(np.random.default_rng(3).dirichlet(np.full(5, 0.6), (4, 5))).astype(np.float32)
    return lambda image, history: chain[len(history) - 1, history[-1]]


@pytest.mark.parametrize(("beams", "score"), [(1, -3.16296), (2, -3.15580), (5, -3.05349)])
def test_golden_values(toy, beams, score):
    params = replace(PLAIN, num_beams=beams, num_captions=1, max_new_tokens=4, length_penalty=0.0)
    model = scripted(toy, 5, eos_id=5)  # outside of the vocabulary: all run to the end
    [[best]] = beam_search(model, [params])
    assert best.score == pytest.approx(score, abs=1e-5)
    if beams == 5:
        assert best.token_ids == (1, 1, 0, 1)


def test_beams_as_wide_as_the_tree_find_all_that_brute_force_finds(toy):
    params = replace(PLAIN, num_beams=125, num_captions=125, max_new_tokens=4, length_penalty=0.0)
    [found] = beam_search(scripted(toy, 5, eos_id=5), [params])
    scored = {
        tokens: sum(float(toy(0, (BOS, *tokens[:i]))[tokens[i]]) for i in range(4))
        for tokens in product(range(5), repeat=4)
    }
    best = sorted(scored, key=lambda tokens: -scored[tokens])[:125]
    assert [hypothesis.token_ids for hypothesis in found] == best


@pytest.mark.parametrize("seed", range(150))
def test_equals_the_slow_transcription_in_mixed_batches(seed):
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.choice([3, 5, 9, 40]))
    max_length = int(rng.integers(6, 14))
    eos_bonus = float(rng.choice([-2.0, 0.0, 3.0, 6.0]))
    script = random_script(seed, vocab_size, eos_bonus=eos_bonus, coarse=seed % 3 == 0)
    params = [random_params(rng, vocab_size) for _ in range(int(rng.integers(1, 6)))]
    found = beam_search(scripted(script, vocab_size, max_length=max_length), params)
    for image, (hypotheses, entry) in enumerate(zip(found, params, strict=True)):
        assert hypotheses == slow_beam_search(script, image, vocab_size, max_length, entry)


def test_dead_rows_are_not_fed_and_done_images_leave():
    # Image 0 wants 5 beams for 2 tokens, image 1 wants 2 beams for 6.
    script = random_script(1, 40, eos_bonus=-50.0)
    params = [
        replace(PLAIN, num_beams=5, num_captions=5, max_new_tokens=2),
        replace(PLAIN, num_beams=2, num_captions=2),
    ]
    model = scripted(script, 40)
    assert [len(hypotheses) for hypotheses in beam_search(model, params)] == [5, 2]
    assert model.fed == [{0: 1, 1: 1}, {0: 5, 1: 2}, {1: 2}, {1: 2}, {1: 2}, {1: 2}]


@pytest.mark.parametrize("seed", range(40))
def test_joining_at_any_step_changes_nothing(seed):
    # Brute force over all sequences where the beam is as wide, the slow transcription elsewhere.
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.choice([3, 5, 40]))
    script = random_script(
        seed, vocab_size, eos_bonus=float(rng.choice([0.0, 3.0])), coarse=seed % 2
    )
    params = [random_params(rng, vocab_size) for _ in range(12)]
    model = scripted(script, vocab_size, max_length=10)
    beams, found, waiting = Beams(model, slots=3), {}, list(range(12))
    while len(found) < 12:
        while waiting and beams.images < 3 and (not beams.images or rng.random() < 0.4):
            image = waiting.pop()
            model.images[beams.join(params[image])] = image
        only = None
        if beams.images > 1 and rng.random() < 0.2:  # as after a step that failed
            only = rng.permutation(beams.slots)[:1].tolist()
        for done in beams.advance(only):
            found[model.images[done.slot]] = done.hypotheses
    for image, entry in enumerate(params):
        assert found[image] == slow_beam_search(script, image, vocab_size, 10, entry)


def test_nodes_that_no_beam_sees_are_used_again():
    script = random_script(2, 40, eos_bonus=-50.0)
    model = scripted(script, 40)
    beam_search(model, [replace(PLAIN, max_new_tokens=30)])
    # Each of 30 steps feeds 4 rows: 117 nodes, if none were used twice.
    assert 30 < len(model.nodes) < 60


def test_a_failed_step_changes_nothing():
    script, fails = random_script(6, 40), []

    def failing(image, history):
        if fails:
            raise RuntimeError(fails.pop())
        return script(image, history)

    beams = Beams(scripted(failing, 40), slots=2)
    for _ in range(2):
        beams.join(PLAIN)
    found = []
    while beams.images:
        fails.append("once")
        with pytest.raises(RuntimeError, match="once"):
            beams.advance()
        found += beams.advance()
    whole = beam_search(scripted(script, 40), [PLAIN] * 2)
    assert [done.hypotheses for done in sorted(found, key=lambda done: done.slot)] == whole


def test_who_leaves_early_makes_room():
    beams = Beams(scripted(random_script(7, 40, eos_bonus=-50.0), 40), slots=2)
    first, second = beams.join(PLAIN), beams.join(PLAIN)
    beams.advance()
    beams.leave(first)
    assert (beams.images, beams.rows, beams.slots) == (1, PLAIN.num_beams, [second])
    assert beams.join(replace(PLAIN, num_beams=2, num_captions=2)) == first
    with pytest.raises(ValueError, match="no slot is free"):
        beams.join(PLAIN)
    while beams.images:
        beams.advance()


def test_nan_costs_one_image_its_captions_and_no_other():
    clean = random_script(3, 40, eos_bonus=3.0)

    def script(image, history):
        if image == 1 and len(history) == 3:  # it has hypotheses by then
            return np.full(40, np.nan, dtype=np.float32)
        return clean(image, history)

    params = [replace(PLAIN, length_penalty=2.0)] * 3
    model = scripted(script, 40)
    hurt = beam_search(model, params)
    whole = beam_search(scripted(clean, 40), params)
    assert min(hypothesis.tokens for hypothesis in whole[1]) < 3
    assert hurt == [whole[0], [], whole[2]]
    assert model.cleared == [1]
    beams = Beams(scripted(lambda *_: np.full(40, np.nan, dtype=np.float32), 40), slots=1)
    beams.join(PLAIN)
    assert beams.advance() == [Done(0, [], is_nan=True)]


def test_a_prefix_is_neither_scored_nor_counted():
    script = random_script(4, 40)
    [[best]] = beam_search(
        scripted(script, 40), [replace(PLAIN, num_captions=1, prefix_ids=(7, 8, 9))]
    )
    history = (BOS, *best.token_ids)
    scored = [script(0, history[:i])[history[i]] for i in range(4, len(history))]
    assert best.token_ids[:3] == (7, 8, 9)
    assert best.tokens == len(scored)
    assert best.log_prob == pytest.approx(sum(scored), rel=1e-5)
    assert best.score == pytest.approx(sum(scored) / len(scored), rel=1e-5)


def test_a_prefix_that_leaves_no_room_is_refused():
    script = random_script(5, 40)
    with pytest.raises(ValueError, match="fills all 4 positions"):
        beam_search(scripted(script, 40, max_length=4), [replace(PLAIN, prefix_ids=(2, 3, 4))])


def torch_model(torch, model, vocab_size):
    """A StepModel over a transformers decoder, without caches."""

    def continue_rows(images, histories):
        return model(torch.tensor(histories)).logits[:, -1].log_softmax(-1).numpy()

    return Histories(continue_rows, vocab_size)


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    import trainer  # lets torchvision, which transformers imports, load beside a CPU PyTorch

    assert trainer
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are so small that threads only wait for each other
    yield torch
    torch.set_num_threads(threads)


def tiny_gpt2(torch, rng, vocab_size):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        initializer_range=float(rng.choice([0.3, 0.6, 1.0])),
        tie_word_embeddings=False,
    )
    torch.manual_seed(int(rng.integers(1 << 31)))
    model = GPT2LMHeadModel(config).eval()
    bias = torch.zeros(vocab_size)
    bias[EOS] = float(rng.choice([-1, 0, 2, 4]))
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


@pytest.mark.parametrize("seeds", [range(start, start + 25) for start in range(0, 200, 25)])
def test_n_best_equal_transformers(torch, seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        vocab_size = int(rng.integers(14, 60))
        model = tiny_gpt2(torch, rng, vocab_size)
        prefixes = rng.integers(2, vocab_size, size=(3, rng.integers(0, 4)))
        beams = int(rng.integers(2, 6))
        params = replace(
            random_params(rng, vocab_size, ngrams=(0, 0, 2, 3)),
            num_beams=beams,
            num_captions=beams,
        )
        with torch.inference_mode():
            prompt = np.concatenate((np.full((3, 1), BOS), prefixes), axis=1)
            answer = model.generate(
                torch.from_numpy(prompt),
                attention_mask=torch.ones(prompt.shape, dtype=torch.long),
                num_beams=beams,
                num_return_sequences=beams,
                max_new_tokens=params.max_new_tokens,
                min_new_tokens=params.min_new_tokens,
                length_penalty=params.length_penalty,
                no_repeat_ngram_size=params.no_repeat_ngram_size,
                early_stopping=False,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
            )
            found = beam_search(
                torch_model(torch, model, vocab_size),
                [replace(params, prefix_ids=tuple(prefix.tolist())) for prefix in prefixes],
            )
        flat = [hypothesis for hypotheses in found for hypothesis in hypotheses]
        ended = [
            row[: row.index(EOS) + 1] if EOS in row else row
            for row in answer.sequences[:, 1:].tolist()
        ]
        assert [list(hypothesis.token_ids) for hypothesis in flat] == ended
        scores = [hypothesis.score for hypothesis in flat]
        np.testing.assert_allclose(scores, answer.sequences_scores.numpy(), rtol=1e-4)
