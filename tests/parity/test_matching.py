"""Matches by PyTorch, by the exported graph, and by the server; and what an export says of them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exports.bundle import Bundle
from exports.images import ImageSpec
from exports.manifest import Generation
from exports.text import TextSpec, framed
from serving.captioner import Captioner as ServedCaptioner
from serving.errors import ParameterError
from serving.params import Params
from trainer.captioner import IMAGE_EMBEDDING, Captioner
from trainer.compression import round_weights
from trainer.decoding import TorchSteps, beam_search
from trainer.errors import ConfigError, ParityError
from trainer.graphs import export_decoder, export_encoder, export_matcher
from trainer.matching import MatcherConfig
from trainer.onnx_steps import OnnxSteps
from trainer.parity import MATCH_TOLERANCE, check_matches
from trainer.run import Run
from trainer.stages import _bundle, evaluate, export, finetune
from trainer.unpacking import unpack

PHOTOS = sorted(Path("tests/photos").glob("*.jpg"))
TEXT = TextSpec(vocab_size=60, pad_id=0, bos_id=1, eos_id=2, max_length=14)
VIT = {
    "name": "timm_vit",
    "model": "vit_tiny_patch16_224",
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
BERT = {
    "name": "bert",
    "width": 32,
    "layers": 2,
    "heads": 2,
    "max_length": 14,
    "text_encoder": True,
}
PROMPT = "one a"
CARD = {"description": "d", "data": "d", "licence": "l", "failures": "f"}


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    torch.manual_seed(3)
    captioner = Captioner(
        encoder=VIT,
        bridge={"name": "cross_attention", "layers": 1, "heads": 2},
        decoder=BERT,
        image=ImageSpec(height=64, width=48),
        text=TEXT,
        matcher=MatcherConfig(width=16),
    )
    assert captioner.matcher is not None
    with torch.no_grad():  # sharper than at random, so that matches differ
        for part in (captioner.decoder, captioner.matcher):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)
    return round_weights(captioner.eval())


@pytest.fixture(scope="module")
def steps(captioner: Captioner) -> OnnxSteps:
    encoder, encoder_spec = export_encoder(captioner)
    decoder, decoder_spec = export_decoder(captioner)
    assert encoder_spec.outputs == (*decoder_spec.memory, IMAGE_EMBEDDING)
    return OnnxSteps(encoder, decoder, encoder_spec, decoder_spec, TEXT, *export_matcher(captioner))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 64, 48, 3), np.uint8)


def some_captions(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    captions = [draw.integers(3, 60, draw.integers(1, 12)).tolist() for _ in range(count)]
    return framed(captions, TEXT)


def test_the_graph_matches_as_the_model(
    captioner: Captioner, steps: OnnxSteps, pixels: np.ndarray
) -> None:
    reference = TorchSteps(captioner)
    assert check_matches(reference, steps, pixels, TEXT) < MATCH_TOLERANCE["float32"]
    assert check_matches(reference, steps, pixels, TEXT, encoder=steps) < MATCH_TOLERANCE["float32"]
    match, similarity = reference.match(
        reference.encode(pixels), *some_captions(24), np.arange(24) % 6
    )
    assert np.ptp(match) > 0.05 and np.ptp(similarity) > 0.05  # else this would tell nothing


def test_a_graph_that_matches_otherwise_is_caught(
    captioner: Captioner, steps: OnnxSteps, pixels: np.ndarray
) -> None:
    class Off(TorchSteps):
        def match(
            self, encoded: Mapping[str, np.ndarray], *captioned: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray]:
            match, similarity = super().match(encoded, *captioned)
            return match, similarity + np.float32(2e-4)

    with pytest.raises(ParityError, match=r"matcher differs from the model: by 0\.0002"):
        check_matches(Off(captioner), steps, pixels, TEXT)


def test_a_caption_matches_the_same_alone_and_with_others(
    steps: OnnxSteps, pixels: np.ndarray
) -> None:
    token_ids, lengths = some_captions(9, seed=1)
    image = np.array([0, 3, 3, 1, 2, 5, 4, 0, 3])
    encoded = steps.encode(pixels)
    together = np.stack(steps.match(encoded, token_ids, lengths, image))
    for row in range(9):
        own = {name: value[image[row] :][:1] for name, value in encoded.items()}
        trimmed = token_ids[row : row + 1, : lengths[row]]
        alone = np.stack(steps.match(own, trimmed, lengths[row : row + 1], np.zeros(1, np.int64)))
        # Float32 sums of other lengths, in other kernels.
        np.testing.assert_allclose(alone[:, 0], together[:, row], atol=1e-5)


def test_captions_in_any_order_match_as_those_that_stand_by_image(
    captioner: Captioner, pixels: np.ndarray
) -> None:
    token_ids, lengths = (torch.from_numpy(part) for part in some_captions(12, seed=2))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert captioner.matcher is not None
    with torch.inference_mode():
        matcher, encoded = captioner.matcher, captioner.encoded(images)
        memory = captioner.memory(images)
        logits = matcher.match_logits(captioner.decoder, token_ids, lengths, memory)
        pooled = matcher.embed_images(captioner.encoder(images)[1])
        texts = matcher.embed_captions(captioner.decoder, token_ids, lengths)
        order = torch.randperm(12)
        image = torch.arange(6).repeat_interleave(2)[order]
        match, similarity = captioner.match(token_ids[order], lengths[order], image, encoded)
    torch.testing.assert_close(match, logits.softmax(1)[order, 1], atol=1e-6, rtol=0)
    nearness = (texts @ pooled.T)[order, image]
    torch.testing.assert_close(similarity, nearness, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps of BLIP on photographs, whose captions stand behind a prompt."""
    root = tmp_path_factory.mktemp("matching")
    rows = [f"{p.resolve()},a {p.stem} on a table\n{p.resolve()},one {p.stem}\n" for p in PHOTOS]
    (root / "photos.csv").write_text("image,caption\n" + "".join(rows))
    (root / "train.csv").write_text("image,caption\n" + "".join(rows[:2]))
    (root / "dev.csv").write_text("image,caption\n" + "".join(rows[2:]))
    config = {
        "data": {
            "train": root / "train.csv",
            "dev": root / "dev.csv",
            "captions_per_image": 2,
        },
        "image": {"height": 64, "width": 48},
        "tokenizer": {"vocab_size": 300},
        "encoder": {"name": "timm_cnn", "model": "tf_efficientnet_lite0"},
        "bridge": {"name": "cross_attention", "layers": 0},
        "decoder": BERT,
        "matcher": {"width": 16},
        "objective": {"name": "blip", "prompt": PROMPT},
        "optim": {"lr": 3e-3},
        "loop": {"epochs": 20, "batch_size": 2, "workers": 0},
    }
    finetune.run(finetune.Config.model_validate(config), root / "run")
    return root / "run"


def export_of(run: Path, **changes: object) -> export.Config:
    data = run.parent / "photos.csv"
    table = {"run": run, "name": "photos", "data": data, "card": CARD, **changes}
    return export.Config.model_validate(table)


@pytest.fixture(scope="module")
def fp32(run: Path) -> Path:
    """The run's bundle."""
    export.run(export_of(run), run.parent / "fp32")
    return run.parent / "fp32" / "bundle"


@pytest.fixture(scope="module")
def narrow(run: Path) -> Mapping[str, Path]:
    """The same in integers and in halves; what few photographs say of a budget is luck."""
    tables = {"int8": {"data": run.parent / "photos.csv", "budget": 10.0}, "fp16": {"budget": 10.0}}
    graphs = _bundle.Graphs.of(Run(run).captioner())
    with pytest.MonkeyPatch.context() as patch:  # they begin with the same; tracing takes long
        patch.setattr(_bundle.Graphs, "of", lambda captioner: graphs)
        for name, table in tables.items():
            export.run(export_of(run, **{name: table}), run.parent / name)
    return {name: run.parent / name / "bundle" for name in tables}


@pytest.fixture(params=["fp32", "int8", "fp16"])
def bundle(request: pytest.FixtureRequest) -> Path:
    if request.param == "fp32":
        found: Path = request.getfixturevalue("fp32")
        return found
    return request.getfixturevalue("narrow")[request.param]


def test_the_server_s_matches_are_the_model_s(run: Path, bundle: Path) -> None:
    served = ServedCaptioner.load(bundle, threads=1)
    manifest, opened = served.manifest, Bundle.open(bundle)
    captioner = Run(run).captioner()
    if manifest.decoder.dtype == "float32":  # then the matcher's weights are rounded
        captioner = round_weights(captioner)
    pixels = np.random.default_rng(1).integers(0, 256, (5, 64, 48, 3), np.uint8)
    params = Params.of(manifest.defaults, num_beams=3, num_captions=3, rerank="itm")
    reference = TorchSteps(captioner)
    # What the model is shown is what the bundle's encoder makes of the images.
    files = (opened.read(file) for file in (manifest.encoder.file, manifest.decoder.file))
    encoded = OnnxSteps(*files, manifest.encoder, manifest.decoder, manifest.text).encode(pixels)
    near = MATCH_TOLERANCE[manifest.decoder.dtype]
    for at, captions in enumerate(served.caption_batch(pixels, [params] * len(pixels))):
        token_ids, lengths = framed([c.token_ids for c in captions], manifest.text)
        image = np.full(len(captions), at)
        match, similarity = reference.match(encoded, token_ids, lengths, image)
        assert [c.match for c in captions] == pytest.approx(match.tolist(), abs=near)
        assert [c.similarity for c in captions] == pytest.approx(similarity.tolist(), abs=near)


def test_a_prompt_is_given_and_no_part_of_a_caption(run: Path, fp32: Path) -> None:
    served, source = ServedCaptioner.load(fp32, threads=1), Run(run)
    tokenizer, prompt = source.tokenizer, source.prompt_ids
    assert served.manifest.prompt_ids == prompt == tuple(tokenizer.encode(PROMPT)) != ()
    pixels = np.random.default_rng(1).integers(0, 256, (6, 64, 48, 3), np.uint8)
    reference = TorchSteps(round_weights(source.captioner()))
    bare = 0
    for prefix in ("", "one"):
        wide = {"num_beams": 3, "num_captions": 3, "max_new_tokens": 6, "no_repeat_ngram_size": 2}
        generation = Generation(**wide)
        params = [Params.of(generation, prefix=prefix)] * len(pixels)
        begins = tokenizer.encode(prefix)
        ours = beam_search(reference, pixels, generation, begins, prompt)
        for first, second in zip(ours, served.caption_batch(pixels, params), strict=True):
            assert [h.token_ids for h in first] == [c.token_ids for c in second]
            assert [h.score for h in first] == pytest.approx([c.score for c in second], abs=1e-4)
            assert [c.text for c in second] == [tokenizer.decode(h.token_ids) for h in first]
            assert all(c.tokens + len(begins) == len(c.token_ids) for c in second)
            assert all(list(c.token_ids[: len(begins)]) == begins for c in second)
        bare += ours != beam_search(reference, pixels, generation, begins)
    assert bare  # the prompt makes a difference
    room = served.manifest.text.max_length - 1 - len(prompt)
    with pytest.raises(ParameterError, match=f"prefix must be shorter: the model writes {room} t"):
        served.check(Params.of(Generation(), prefix="one " * room))


def test_a_bundle_says_what_reranking_comes_to(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    assert manifest.matcher is not None
    assert all(golden.match is not None for golden in manifest.golden)
    reported = manifest.metrics["rerank"]
    assert isinstance(reported, dict)
    for name in ("itm", "clip"):
        arm = reported[name]
        assert arm["weight"] == getattr(manifest.matcher.reranking, f"{name}_weight")
        low, high = arm["gain"]["CIDEr-D"][1:]
        assert low <= arm["gain"]["CIDEr-D"][0] <= high
    assert manifest.provenance["match_parity"] < MATCH_TOLERANCE[manifest.decoder.dtype]
    card = opened.read("MODEL_CARD.md").decode()
    assert "`rerank=itm` (the search weighing" in card
    assert "2 images of the run's dev data best" in card
    matcher = onnx.load_from_string(opened.read("matcher.onnx"))
    assert not any("Integer" in node.op_type for node in matcher.graph.node)
    assert not any("Quantize" in node.op_type for node in matcher.graph.node)
    table = {"model": bundle, "data": bundle.parent.parent / "photos.csv"}
    evaluate.run(evaluate.Config.model_validate(table), tmp_path)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["rerank"] == reported


def test_an_evaluation_of_a_run_reranks_as_well(run: Path, tmp_path: Path, capsys) -> None:
    table = {"model": run, "data": run.parent / "photos.csv", "generation": {"num_beams": 3}}
    evaluate.run(evaluate.Config.model_validate(table), tmp_path)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert {name: arm["weight"] for name, arm in written["rerank"].items()} == {
        "itm": 0.5,
        "clip": 0.5,
    }
    assert "reranked by itm, the search weighing 0.5, minus the above" in capsys.readouterr().out


def test_a_matcher_that_differs_is_not_published(
    run: Path, fp32: Path, tmp_path: Path, monkeypatch
) -> None:
    opened = Bundle.open(fp32)
    manifest = opened.manifest
    assert manifest.matcher is not None
    model = onnx.load_from_string(opened.read("matcher.onnx"))
    largest = max(model.graph.initializer, key=lambda weight: len(weight.raw_data))
    values = onnx.numpy_helper.to_array(largest)
    spoilt = np.clip(values * 1.5, -127, 127).astype(values.dtype)
    largest.CopyFrom(onnx.numpy_helper.from_array(spoilt, largest.name))
    for part, body in (
        ("encoder", opened.read("encoder.onnx")),
        ("decoder", opened.read("decoder.onnx")),
        ("matcher", model.SerializeToString()),
    ):
        exported = (body, getattr(manifest, part))
        monkeypatch.setattr(_bundle, f"export_{part}", lambda _, exported=exported: exported)
    with pytest.raises(ParityError, match="the exported matcher differs"):
        export.run(export_of(run), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_matcher_needs_cross_attention() -> None:
    with pytest.raises(ConfigError, match=r"by cross-attention, not as prefix"):
        Captioner(
            encoder=VIT,
            bridge={"name": "concat"},
            decoder=BERT,
            image=ImageSpec(height=64, width=48),
            text=TEXT,
            matcher=MatcherConfig(width=16),
        )


def test_a_bundle_with_a_matcher_is_read_back(run: Path, bundle: Path) -> None:
    _, captioner = unpack(Bundle.open(bundle))
    before = Run(run).captioner()
    assert captioner.matcher is not None and before.matcher is not None
    known = before.matcher.state_dict()
    for name, weight in captioner.matcher.state_dict().items():
        if name == "temperature":  # of training alone: graphs have none
            continue
        torch.testing.assert_close(weight, known[name], rtol=0, atol=0.02)
