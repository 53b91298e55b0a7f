"""Every decoder family under every bridge that it takes: what it computes, and what it learns."""

import copy
from itertools import product

import pytest
import torch
from tiny_captioner import TEXT, bridge_table, decoder_table
from transformers.models.t5.modeling_t5 import T5Attention

from trainer import variants
from trainer.attention import Memory
from trainer.decoders.t5 import buckets
from trainer.errors import ConfigError
from trainer.objectives.lm import Config as LmConfig
from trainer.objectives.lm import Objective as Lm
from trainer.reading import Reading

FAMILIES = variants.names("decoders")
SYSTEMS = [
    (decoder, bridge)
    for decoder, bridge in product(FAMILIES, variants.names("bridges"))
    if decoder not in ("bart", "t5") or bridge in ("cross_attention", "linear")
]
IMAGES = torch.randint(
    0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
IDS = torch.randint(3, TEXT.vocab_size, (6, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=SYSTEMS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def captioner(request, make_captioner):
    """A random captioner of each kind, its gates open."""
    decoder, bridge = request.param
    return make_captioner(
        bridge=bridge_table(bridge), decoder=decoder_table(decoder), sharpen=sharpness(decoder)
    )


def sharpness(family: str) -> float:
    """T5 does not scale its products, BART and BERT begin with larger weights: as sharp, they would
    round as wildly."""
    return 2 if family in ("bart", "bert", "t5") else 6


def build(family: str, reading: Reading):
    torch.manual_seed(0)
    module, config = variants.parse("decoders", decoder_table(family))
    return module.Decoder(config, text=TEXT, reading=reading).eval()


@pytest.mark.parametrize("decoder", FAMILIES)
@pytest.mark.parametrize("bridge", variants.names("bridges"))
def test_a_pair_is_built_or_refused_in_words(make_captioner, decoder: str, bridge: str) -> None:
    tables = {"bridge": bridge_table(bridge), "decoder": decoder_table(decoder)}
    if (decoder, bridge) in SYSTEMS:
        make_captioner(**tables)
    else:
        with pytest.raises(ConfigError, match=rf"decoder {decoder} cannot take .* another bridge"):
            make_captioner(**tables)


def test_steps_with_a_cache_equal_the_whole_sequence(captioner) -> None:
    with torch.no_grad():
        whole = captioner(IMAGES, IDS)  # three captions an image
        memory, past = captioner.memory(IMAGES), captioner.empty_cache(6)
        for position in range(IDS.shape[1]):
            logits, past = captioner.step(IDS[:, position], position, past, memory)
            torch.testing.assert_close(logits, whole[:, position], atol=1e-4, rtol=0)


def test_captions_of_one_image_do_not_know_of_each_other(captioner) -> None:
    with torch.no_grad():
        together = captioner(IMAGES, IDS)
        alone = captioner(IMAGES[1:], IDS[4:5])
    torch.testing.assert_close(together[4:5], alone, atol=1e-4, rtol=0)


def test_padding_behind_a_caption_changes_nothing_before_it(captioner) -> None:
    other = IDS.clone()
    other[:, 5:] = TEXT.pad_id
    with torch.no_grad():
        before, after = captioner(IMAGES, IDS)[:, :5], captioner(IMAGES, other)[:, :5]
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


def test_the_image_matters(captioner) -> None:
    ids = torch.tensor([[1, 5, 6]]).expand(2, -1)
    with torch.no_grad():
        first, second = captioner(IMAGES, ids)
    assert (first - second).abs().max() > 1e-3


def test_sixteen_pairs_are_learnt_by_heart_and_by_their_images(captioner) -> None:
    torch.manual_seed(0)
    captioner = copy.deepcopy(captioner)
    with torch.no_grad():  # back to where training begins
        family = type(captioner.decoder).__module__.rpartition(".")[2]
        for parameter in captioner.decoder.parameters():
            parameter.div_(sharpness(family) if parameter.ndim > 1 else 1)
    draw = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (16, 3, 4, 6), dtype=torch.uint8, generator=draw)
    images = images.repeat_interleave(8, 2).repeat_interleave(8, 3)  # 32 x 48, in large pixels
    ids = torch.randint(3, TEXT.vocab_size, (16, 6), generator=draw)
    ids[:, 0], ids[:, 1], ids[:, -1] = TEXT.bos_id, 3, TEXT.eos_id
    batch = {"images": images, "token_ids": ids, "lengths": torch.full((16,), 6)}
    objective = Lm(LmConfig(label_smoothing=0.0), captioner, None).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for _ in range(400):
        found = objective(batch)
        optimizer.zero_grad()
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        if found["token_accuracy"] == 1 and found["loss"] < 0.1:
            break
    objective.eval()
    with torch.no_grad():
        right = objective(batch)
        shuffled = objective({**batch, "images": images.roll(1, 0)})
    assert right["token_accuracy"] == 1
    assert shuffled["loss"] > right["loss"] + 1


def theirs(family: str, decoder, **inputs):
    """What the family's class in `transformers` says with the same weights."""
    ours = decoder.model
    model = type(ours)(copy.deepcopy(ours.config)).eval()
    model.load_state_dict(ours.state_dict(), strict=family != "t5")  # ours has no encoder
    with torch.no_grad():
        if family == "t5":
            inputs = {f"decoder_{k}" if k == "input_ids" else k: v for k, v in inputs.items()}
            inputs["encoder_outputs"] = (inputs.pop("encoder_hidden_states"),)
        return model(**inputs).logits


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_a_family_equals_its_class_in_transformers(family: str) -> None:
    decoder = build(family, Reading("cross_attention"))
    tokens, ids = torch.randn(3, 5, 32), IDS[:3]
    with torch.no_grad():
        ours = decoder(ids, decoder.memory(tokens))
    expected = theirs(family, decoder, input_ids=ids, encoder_hidden_states=tokens)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prefix_is_as_good_as_words_before_the_text(family: str) -> None:
    decoder = build(family, Reading("prefix", room=4))
    prefix, ids = torch.randn(3, 4, 32), IDS[:3]
    embedded = decoder.model.get_input_embeddings()(ids)
    with torch.no_grad():
        ours = decoder(ids, decoder.memory(prefix))
    whole = theirs(family, decoder, inputs_embeds=torch.cat([prefix, embedded], dim=1))
    torch.testing.assert_close(ours, whole[:, 4:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_closed_gates_leave_the_language_model_as_it_was(family: str) -> None:
    gated = build(family, Reading("gated"))
    alone = build(family, Reading("prefix"))
    alone.load_state_dict(gated.state_dict(), strict=False)
    nothing = torch.zeros(3, 0, 32)
    with torch.no_grad():
        expected = alone(IDS[:3], alone.memory(nothing))
        for _ in range(2):  # whatever the image
            ours = gated(IDS[:3], gated.memory(torch.randn(3, 5, 32)))
            assert torch.equal(ours, expected)


def test_image_tokens_of_concat_see_each_other_and_those_of_prefix_what_came_before() -> None:
    for reading, sees in ((Reading("prefix", causal=False), True), (Reading("prefix"), False)):
        decoder = build("gpt2", reading)
        tokens = torch.randn(1, 4, 32)
        other = tokens.clone()
        other[:, 3] = torch.randn(32)
        with torch.no_grad():
            first, second = (decoder.memory(t).prefix for t in (tokens, other))
        changed = not torch.equal(first[2][:, :, 0], second[2][:, :, 0])  # keys of layer 1
        assert changed == sees


def test_buckets_of_distances_are_t5_s() -> None:
    distances = -torch.arange(300)
    expected = T5Attention._relative_position_bucket(
        distances, bidirectional=False, num_buckets=32, max_distance=128
    )
    assert torch.equal(buckets(300, 32, 128), expected)


def test_rotary_positions_count_only_by_their_distance() -> None:
    decoder = build("llama", Reading("prefix", room=5))
    query, key = torch.randn(2, 32)
    turn = [(decoder.cosine[p], decoder.sine[p]) for p in range(10)]
    products = [
        (decoder._turned(query, *turn[p + 3]) * decoder._turned(key, *turn[p])).sum()
        for p in range(6)
    ]
    torch.testing.assert_close(torch.stack(products), products[0].expand(6), atol=1e-4, rtol=0)


def test_reading_looks_both_ways_and_shares_all_but_self_attention() -> None:
    module, config = variants.parse("decoders", {**decoder_table("bert"), "text_encoder": True})
    torch.manual_seed(0)
    decoder = module.Decoder(config, text=TEXT, reading=Reading("cross_attention")).eval()
    lengths = torch.tensor([7, 5, 7])
    ids = IDS[:3].clone()
    with torch.no_grad():
        before = decoder.read(ids, lengths)
        ids[0, 6], ids[1, 6] = 4, 4  # a token of the first, padding of the second
        after = decoder.read(ids, lengths)
        assert not torch.equal(before[0, 0], after[0, 0])
        torch.testing.assert_close(before[1, :5], after[1, :5])
        memory = decoder.memory(torch.randn(3, 5, 32))
        assert not torch.equal(decoder.read(ids, lengths, memory), after)
    decoder.read(ids, lengths, memory).sum().backward()
    touched = {name for name, p in decoder.named_parameters() if p.grad is not None}
    assert "reading_attention.0.self.query.weight" in touched
    assert "model.bert.encoder.layer.0.attention.self.query.weight" not in touched
    for shared in ("crossattention.self.query", "intermediate.dense", "output.dense"):
        assert f"model.bert.encoder.layer.0.{shared}.weight" in touched


def test_a_memory_survives_its_names() -> None:
    pairs = tuple(torch.randn(2, 4, n, 8) for n in (3, 3, 3, 3, 5, 5))
    memory = Memory(pairs[:4], pairs[4:], torch.zeros(2, 1, 1, 5))
    again = Memory.of(memory.named())
    assert again.image == memory.image and again.prefix == memory.prefix
    assert again.prefix_visible is memory.prefix_visible
    assert list(memory.named())[:3] == ["memory_k.0", "memory_v.0", "memory_k.1"]
