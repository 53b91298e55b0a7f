"""The contrastive losses against their papers' sums, and the batches larger than memory."""

import copy
import math

import pytest
import torch
from pretraining import CNN, batch_of, method_of
from torch.nn import functional as F

from trainer.errors import ConfigError
from trainer.methods._contrastive import Pooled, in_chunks, info_nce, nt_xent, projection_head
from trainer.methods.clip import clip_loss, same_captions


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=draw, dtype=torch.float64), dim=1).float()


def slow_nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
    """Equation 1 of SimCLR, sum by sum."""
    both = torch.cat([first, second]).double().tolist()
    n, total = len(first), 0.0

    def similarity(a: list[float], b: list[float]) -> float:
        return math.exp(sum(x * y for x, y in zip(a, b, strict=True)) / temperature)

    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = sum(similarity(both[i], both[k]) for k in range(2 * n) if k != i)
        total -= math.log(similarity(both[i], both[j]) / others)
    return total / (2 * n)


def test_nt_xent_of_two_orthogonal_pairs() -> None:
    pairs = torch.eye(2)
    assert nt_xent(pairs, pairs, 0.5).item() == pytest.approx(0.239545, abs=1e-5)


def test_nt_xent_of_embeddings_that_are_all_equal() -> None:
    same = unit(1, 16).expand(8, -1)
    assert nt_xent(same, same, 0.5).item() == pytest.approx(math.log(15), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_nt_xent_is_the_paper_s_sum(seed: int) -> None:
    first, second = unit(7, 5, seed=seed), unit(7, 5, seed=seed + 100)
    found = nt_xent(first, second, 0.3)
    assert found.item() == pytest.approx(slow_nt_xent(first, second, 0.3), rel=1e-5)
    assert nt_xent(second, first, 0.3).item() == pytest.approx(found.item(), rel=1e-6)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    assert nt_xent(first[order], second[order], 0.3).item() == pytest.approx(found.item(), rel=1e-5)


def test_info_nce_of_uniform_logits() -> None:
    same = unit(1, 16).expand(8, -1)
    assert info_nce(same, same, 0.2).item() == pytest.approx(math.log(8), abs=1e-5)


def test_clip_s_golden_values() -> None:
    logits = torch.eye(4, dtype=torch.float64) / 0.07
    found = clip_loss(logits, torch.eye(4, dtype=torch.float64))
    assert found.item() == pytest.approx(1.8746e-6, rel=1e-4)


def test_captions_that_repeat_share_the_answer() -> None:
    token_ids = torch.tensor([[1, 5, 2], [1, 6, 2], [1, 5, 2]])
    targets = same_captions(token_ids)
    assert targets.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
    logits = torch.tensor([[4.0, 0, 4], [0, 4, 0], [4, 0, 4]])
    apart = clip_loss(logits, torch.eye(3))
    assert clip_loss(logits, targets) == pytest.approx(apart.item(), abs=1e-6)
    wrong = torch.tensor([[9.0, 0, -9], [0, 9, 0], [-9, 0, 9]])  # tells equal captions apart
    assert clip_loss(wrong, torch.eye(3)) < 1e-3 < clip_loss(wrong, targets)


def test_logit_scale_never_exceeds_a_hundred() -> None:
    method = method_of({"name": "clip"})
    with torch.no_grad():
        method.logit_scale.fill_(9.0)
    assert method(batch_of(method, 8))["logit_scale"].item() == pytest.approx(100)
    method.after_step(1)
    assert method.logit_scale.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize(
    ("own", "other", "temperature", "expected"),
    [(1.0, 0.0, 0.2, 6.092617), (1.0, 0.0, 0.07, 0.040135), (1.0, 1.0, 0.2, math.log(65537))],
)
def test_moco_s_golden_values(
    own: float, other: float, temperature: float, expected: float
) -> None:
    method = method_of({"name": "moco", "temperature": temperature, "width": 2}, batch=4)
    vectors = [[1.0, 0.0], [own, math.sqrt(1 - own**2)], [other, math.sqrt(1 - other**2)]]
    queries, keys, negative = torch.tensor(vectors, dtype=torch.float64).split(1)
    queue = negative.expand(65536, -1)
    assert method.queue_loss(queries, keys, queue).item() == pytest.approx(expected, abs=1e-5)


def test_the_queue_holds_the_last_keys() -> None:
    method = method_of({"name": "moco", "width": 16}, images=20, batch=4).train()
    assert method.queue.shape == (10, 16)
    keys = []
    for step in range(7):
        method(batch_of(method, 4, seed=step))
        keys.extend(method._new_keys[0])
        method.after_step(step + 1)
    assert method.pointer.item() == 28 % 10
    expected = torch.stack(keys[-10:])
    held = method.queue[(torch.arange(10) + 28) % 10]
    assert torch.equal(held, expected)
    assert torch.allclose(method.queue.norm(dim=1), torch.ones(10))


def test_keys_carry_no_gradient_and_evaluation_queues_none() -> None:
    method = method_of({"name": "moco", "width": 16}, batch=4).train()
    method(batch_of(method, 4))["loss"].backward()
    assert all(p.grad is None for p in method.momentum_encoder.parameters())
    method._new_keys.clear()
    method.eval()
    method(batch_of(method, 4))
    assert not method._new_keys


def test_the_copy_follows_in_closed_form() -> None:
    method = method_of({"name": "moco", "momentum": 0.9, "width": 16}, batch=4)
    start = copy.deepcopy(method.momentum_head)
    with torch.no_grad():
        for parameter in method.head.parameters():
            parameter.add_(1.0)
    for step in range(5):
        method.after_step(step + 1)
    for mine, old, new in zip(
        method.momentum_head.parameters(), start.parameters(), method.head.parameters(), strict=True
    ):
        expected = 0.9**5 * old + (1 - 0.9**5) * new
        assert torch.allclose(mine, expected, atol=1e-6)


def test_the_momentum_of_v3_ends_at_one() -> None:
    method = method_of({"name": "moco", "variant": "v3", "momentum": 0.5, "width": 16})
    with torch.no_grad():
        for parameter in method.head.parameters():
            parameter.add_(1.0)
    before = copy.deepcopy(list(method.momentum_head.parameters()))
    method.after_step(method.setting.steps)
    after = list(method.momentum_head.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_v3_is_symmetric_and_its_formula_s() -> None:
    method = method_of({"name": "moco", "variant": "v3", "width": 16, "hidden": 32}).train()
    batch = batch_of(method, 8)
    first, second = batch["images"].chunk(2)

    def query(view: torch.Tensor) -> torch.Tensor:
        return F.normalize(method.predictor(method.head(method.encoder(view)[1])), dim=1)

    def key(view: torch.Tensor) -> torch.Tensor:
        return F.normalize(method.momentum_head(method.momentum_encoder(view)[1]), dim=1)

    expected = 0.0
    for mine, other in ((first, second), (second, first)):
        logits = query(mine) @ key(other).T / 0.2
        for row in range(8):
            expected -= 2 * 0.2 * torch.log_softmax(logits[row], 0)[row].item() / 8
    assert method(batch)["loss"].item() == pytest.approx(expected, rel=1e-4)
    swapped = {**batch, "images": torch.cat([second, first])}
    assert method(swapped)["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_v3_leaves_the_patch_projection_as_it_is() -> None:
    method = method_of({"name": "moco", "variant": "v3"})
    patches = method.encoder.backbone.patch_embed
    assert not any(parameter.requires_grad for parameter in patches.parameters())


@pytest.mark.parametrize(
    ("table", "images", "batch", "message"),
    [
        ({"queue": 65536}, 1000, 64, "method.queue = 65536, but there are 1000 images"),
        ({}, 100, 64, "a queue of 50 keys is smaller than a batch of 64"),
    ],
)
def test_queues_that_cannot_be(table, images: int, batch: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_of({"name": "moco", **table}, images=images, batch=batch)


def test_a_queue_of_more_than_half_the_images_is_cut(capsys) -> None:
    method = method_of({"name": "moco", "queue": 900}, images=1000, batch=64)
    assert len(method.queue) == 500
    assert "taken as 500" in capsys.readouterr().out


def test_normalising_in_parts_keeps_the_keys_in_order() -> None:
    method = method_of({"name": "moco", "norm_splits": 2, "width": 16}, batch=4).eval()
    images = batch_of(method, 4)["images"][:4]
    assert torch.allclose(method._shuffled_keys(images), method._keys(images), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_gradients_in_chunks_are_those_of_the_whole_batch(chunk: int) -> None:
    found = []
    for size in (0, chunk):
        method = method_of({"name": "simclr", "hidden": 32, "width": 16, "chunk": size}).train()
        loss = method(batch_of(method, 8))["loss"]
        loss.backward()
        found.append((loss, {n: p.grad for n, p in method.named_parameters()}))
    (whole, gradients), (parts, others) = found
    assert parts.item() == pytest.approx(whole.item(), abs=1e-6)
    # Of the whole gradient's length: single numbers of a large one round by more than 1e-6.
    apart = sum((gradients[name] - others[name]).square().sum() for name in gradients).sqrt()
    length = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    assert apart < 1e-6 * length


def test_chunks_draw_the_same_dropout_twice() -> None:
    torch.manual_seed(0)
    noisy = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)).train()
    images = torch.rand(6, 8)
    torch.manual_seed(1)
    found = in_chunks(noisy, images, 2)
    found.square().sum().backward()
    torch.manual_seed(1)
    expected = torch.cat([noisy(part) for part in images.split(2)])
    gradient = torch.autograd.grad(expected.square().sum(), noisy[0].weight)[0]
    assert torch.allclose(noisy[0].weight.grad, gradient, atol=1e-6)


def test_chunks_count_into_running_statistics_once() -> None:
    method = method_of({"name": "simclr"}, encoder=CNN).train()
    other = copy.deepcopy(method)
    images = batch_of(method, 8)["images"]
    in_chunks(Pooled(method.encoder), images, 8).sum().backward()
    for part in images.split(8):
        other.encoder(part)
    for (name, mine), theirs in zip(
        method.encoder.named_buffers(), other.encoder.buffers(), strict=True
    ):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_statistics_are_kept_where_that_is_asked(name: str, kept: bool) -> None:
    method = method_of({"name": name, "keep_statistics": kept}, encoder=CNN, batch=4).train()
    before = {key: value.clone() for key, value in method.named_buffers() if "running" in key}
    method(batch_of(method, 4))["loss"].backward()
    after = dict(method.named_buffers())
    inside = [key for key in before if "encoder" in key]
    assert inside and all(torch.equal(before[key], after[key]) == kept for key in inside)
    assert all(p.grad is not None for p in method.encoder.parameters())


def test_the_head_is_a_linear_layer_when_it_has_one() -> None:
    head = projection_head(8, 4)
    assert [type(layer).__name__ for layer in head] == ["Linear"]
    deep = projection_head(8, 6, 4, last_norm=True, affine=False)
    assert [type(layer).__name__ for layer in deep] == [
        *("Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d")
    ]
    assert deep[1].affine and not deep[4].affine
