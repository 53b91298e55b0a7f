"""Every reward: the contract, and what each is worth on captions that can be judged by eye."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from judged import EXAMPLES, alone, label_file, sampled, sources
from objectives.test_pairs import pairs_recipe

from trainer import variants
from trainer.data import read_examples
from trainer.dataset import padded
from trainer.errors import ConfigError, DataError
from trainer.metrics.cider import CiderD
from trainer.retrieval import caption_ids
from trainer.rewards import bad_endings, bleu4, cider_d, edits, repetition
from trainer.rewards._reward import Sources, marked
from trainer.run import Run
from trainer.stages import finetune


@pytest.fixture(scope="module")
def matcher_run(shapes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("matcher")
    finetune.run(pairs_recipe(shapes, "itm", loop={"epochs": 1, "ema": 0.0}), folder)
    return folder


@pytest.fixture(scope="module")
def everything(matcher_run, tmp_path_factory) -> Sources:
    rows = {"image": "dog.jpg", "captions": ["a dog runs"], "rejected": ["a cat sits"]}
    answers = label_file(tmp_path_factory.mktemp("labels") / "answers.jsonl", rows)
    return sources(matcher=matcher_run, edits=answers)


@pytest.mark.parametrize("name", variants.names("rewards"))
def test_a_caption_is_judged_by_itself(name: str, everything: Sources) -> None:
    reward = variants.load("rewards", name).Reward(everything)
    texts = ("a dog runs on the grass", "a cat", "", "a bus on a", "a bus bus", "a bus bus")
    one = sampled(*texts, examples=(0, 0, 0, 1, 1, 1))
    found = reward.scores(one)
    assert found.shape == (6,) and found.dtype == np.float64 and np.isfinite(found).all()
    np.testing.assert_allclose(found, alone(reward, one), atol=1e-5)
    assert found[4] == pytest.approx(found[5])
    assert len(set(found.round(6))) > 1, "it finds all captions alike"


def test_cider_d_counts_the_end_as_a_word() -> None:
    reward = cider_d.Reward(sources())
    whole, cut, shorter = "a dog runs on the grass", "a dog runs on the", "a dog runs"
    found = reward.scores(sampled(whole, cut, shorter))
    assert found[0] > max(found[1:])
    assert reward.scores(sampled(whole, ended=False))[0] < found[0]
    scorer = CiderD([marked(example.captions) for example in EXAMPLES])
    assert found[0] == pytest.approx(scorer.score(0, "a dog runs on the grass eos"))


def slow_bleu(tokens: list[str], references: list[list[str]]) -> float:
    """The formula of the module, word by word."""
    logs = 0.0
    for k in range(1, 5):
        grams = [tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1)]
        most = Counter[tuple[str, ...]]()
        for other in references:
            most |= Counter(tuple(other[i : i + k]) for i in range(len(other) - k + 1))
        matched = sum(min(n, most[one]) for one, n in Counter(grams).items())
        added = 0 if k == 1 else 1
        if matched + added == 0:
            return 0.0
        logs += math.log((matched + added) / (len(grams) + added)) / 4
    nearest = min((abs(len(r) - len(tokens)), len(r)) for r in references)[1]
    return math.exp(logs) * min(1.0, math.exp(1 - nearest / len(tokens)))


def test_bleu_is_smoothed_and_has_its_brevity_penalty() -> None:
    reward = bleu4.Reward(sources())
    texts = ["a dog runs on the grass", "a dog a dog a dog", "dog", "a cat sits", "bus"]
    references = [[*caption.split(), "eos"] for caption in EXAMPLES[0].captions]
    expected = [slow_bleu([*text.split(), "eos"], references) for text in texts]
    np.testing.assert_allclose(reward.scores(sampled(*texts)), expected, atol=1e-12)
    assert expected[0] == pytest.approx(1.0)
    assert expected[1] > expected[3] > 0, "no common bigram, and still more than nothing"
    # "dog eos" of 2 words against 7: e^(1 - 7/2), 2 of 2 words, 1 + 0 of 1 + 1 pairs, nothing else.
    assert expected[2] == pytest.approx(math.exp(1 - 7 / 2) * (1 * 0.5 * 1 * 1) ** 0.25)
    assert reward.scores(sampled("", ended=False)).tolist() == [0.0]


def test_faults_are_found() -> None:
    texts = ("a red red bus", "a bus in the city in the city", "a bus in", "a bus", "")
    assert repetition.Reward(sources()).scores(sampled(*texts)).tolist() == [1, 1, 0, 0, 0]
    assert bad_endings.Reward(sources()).scores(sampled(*texts)).tolist() == [0, 0, 1, 0, 0]
    cut = sampled("a bus", ended=False)
    assert bad_endings.Reward(sources()).scores(cut).tolist() == [1]


def test_a_matcher_judges_pictures_of_its_own_size(matcher_run, shapes) -> None:
    examples = read_examples(shapes / "captions_dev.json")[:2]
    module, similar = (variants.load("rewards", name) for name in ("match", "similarity"))
    written = [example.captions for example in examples]
    given = Sources(examples, written, sources().frequencies, matcher=matcher_run)
    texts = [text for example in examples for text in example.captions[:2]]
    one = sampled(*texts, examples=(0, 0, 1, 1))
    found = module.Reward(given).scores(one)
    cosines = similar.Reward(given).scores(one)
    run = Run(matcher_run)
    captioner = run.captioner()
    token_ids, lengths = padded(
        [caption_ids(run.tokenizer, run.text, text) for text in texts], run.text.pad_id
    )
    with torch.no_grad():
        match, similarity = captioner.match(
            token_ids, lengths, torch.tensor([0, 0, 1, 1]), captioner.encoded(one.images)
        )
    np.testing.assert_allclose(found, match.numpy(), atol=1e-5)
    np.testing.assert_allclose(cosines, similarity.numpy(), atol=1e-5)
    assert ((found > 0) & (found < 1)).all()
    larger = one.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    resized = module.Reward(given).scores(type(one)(one.texts, one.ended, one.references, larger))
    np.testing.assert_allclose(resized, found, atol=0.02)


@pytest.mark.parametrize(("name", "key"), [("match", "matcher"), ("edits", "edits")])
def test_a_reward_says_what_it_lacks(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"has {name}, which .* as objective\.{key}"):
        variants.load("rewards", name).Reward(sources())


def answers(tmp_path: Path, *rows: dict[str, object]) -> edits.Reward:
    return edits.Reward(sources(edits=label_file(tmp_path / "answers.jsonl", *rows)))


def test_what_a_person_turned_down_costs(tmp_path: Path) -> None:
    accepted, rejected = "a dog runs on the grass", "a cat runs on the grass"
    reward = answers(tmp_path, {"image": "dog.jpg", "captions": [accepted], "rejected": [rejected]})
    found = reward.scores(sampled(accepted, rejected, "people by the sea"))
    assert found[0] == pytest.approx(-found[1])
    assert found[0] > 0.2 and abs(found[2]) < 0.01
    frequencies = sources().frequencies
    near = [
        CiderD([[text + " eos"]], frequencies=frequencies).score(0, accepted + " eos") / 10
        for text in (accepted, rejected)
    ]
    assert near[0] == pytest.approx(1.0)
    assert found[0] == pytest.approx(near[0] - near[1])
    elsewhere = sampled(accepted, rejected, examples=(1, 1))
    assert reward.scores(elsewhere).tolist() == [0, 0], "nobody said anything of that image"


def test_the_nearest_of_several_counts(tmp_path: Path) -> None:
    both = ["a dog runs", "people ride bikes near the sea"]
    reward = answers(tmp_path, {"image": "dog.jpg", "captions": both})
    assert reward.scores(sampled(*both)).tolist() == pytest.approx([1.0, 1.0])


def test_label_files_are_read_to_the_last_answer(tmp_path: Path, capsys) -> None:
    path = label_file(
        tmp_path / "answers.jsonl",
        {"image": "dog.jpg", "captions": ["a cat"]},
        {"image": "b/bus.jpg", "captions": [], "action": "skip"},
        {"image": "dog.jpg", "captions": ["a dog"], "proposals": ["a cat", "a dog"]},
        {"image": "unknown.jpg", "captions": ["a tree"]},
    )
    with path.open("a", encoding="utf-8") as file:
        file.write('{"image": "a/bus.j')
    dog, tree = edits.read_answers(path)
    assert (dog.accepted, dog.rejected) == (("a dog",), ("a cat",))
    assert tree.image == "unknown.jpg"
    edits.Reward(sources(edits=path))
    said = capsys.readouterr().out
    assert f"{path}:5: half a line, left out" in said
    assert "1 of the 2 answered images are trained on" in said


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ('{"image": "bus.jpg", "captions": ["a bus"]}', DataError, "may be 2 of the images"),
        ('{"image": "tree.jpg", "captions": ["a tree"]}', ConfigError, "none of its 1 answered"),
        ('{"image": "dog.jpg", "captions": "a', DataError, r"jsonl:1: not JSON"),
        ('{"image": "dog.jpg", "rejected": 7}', DataError, "rejected: 7 is neither a caption"),
    ],
)
def test_bad_label_files_are_named(row: str, error, message: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(error, match=message):
        edits.Reward(sources(edits=path))


def test_a_missing_label_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        edits.Reward(sources(edits=tmp_path / "none.jsonl"))
