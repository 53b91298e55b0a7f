"""Three implementations of one captioner: PyTorch, the trainer's ONNX steps, the server."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError

from exports.bundle import Bundle
from exports.images import ImageSpec
from exports.manifest import Generation, Manifest
from exports.text import TextSpec, Tokenizer
from serving.captioner import Captioner as ServedCaptioner
from serving.decode_image import ImageLimits, decode_image
from serving.params import Params
from serving.session import Graphs as ServedGraphs
from serving.session import OnnxSession
from trainer import variants
from trainer.captioner import Captioner
from trainer.compression import compress, round_weights
from trainer.decoding import TorchSteps, beam_search
from trainer.errors import ConfigError, DataError, ParityError, TrainerError
from trainer.graphs import export_decoder, export_encoder, join_graph
from trainer.onnx_steps import OnnxSteps
from trainer.parity import Parity, compare
from trainer.photos import load_pixels
from trainer.run import Run
from trainer.stages import evaluate, export, finetune
from trainer.stages._bundle import Graphs
from trainer.stages._card import recipe_of
from trainer.stages._precision import Fp16
from trainer.tokenizer import train_tokenizer

PHOTOS = sorted(Path("tests/photos").glob("*.jpg"))
TEXT = TextSpec(vocab_size=60, pad_id=0, bos_id=1, eos_id=2, max_length=14)
ENCODERS = {
    "timm_cnn": {"name": "timm_cnn", "model": "tf_efficientnet_lite0"},
    "timm_vit": {
        "name": "timm_vit",
        "model": "vit_tiny_patch16_224",
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
    },
}


# One of each way to attend: by distance, with shared keys behind a prefix, by gates.
KINDS = [("t5", "cross_attention"), ("llama", "prefix"), ("bert", "perceiver")]
SYSTEMS = [
    (decoder, bridge)
    for decoder, bridge in product(variants.names("decoders"), variants.names("bridges"))
    if bridge != "linear"  # to the graphs it is as cross_attention
    and (decoder not in ("bart", "t5") or bridge == "cross_attention")
]


def random_captioner(
    encoder: str, bridge: str = "cross_attention", decoder: str = "gpt2", **changes: Any
) -> Captioner:
    torch.manual_seed(3)
    bridges: dict[str, dict[str, Any]] = {
        "prefix": {"length": 3},
        "perceiver": {"latents": 4, "layers": 1, "heads": 2},
    }
    sizes = {"width": 32, "layers": 2, "heads": 2, "max_length": 14}
    sizes |= {"key_value_heads": 1} if decoder == "llama" else {}
    captioner = Captioner(
        encoder=ENCODERS[encoder],
        bridge={"name": bridge, **bridges.get(bridge, {}), **changes},
        decoder={"name": decoder, **sizes},
        image=ImageSpec(height=64, width=48),
        text=TEXT,
    )
    with torch.no_grad():  # sharper than at random, so that captions differ
        for parameter in captioner.decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2 if decoder == "t5" else 5)
        for block in captioner.decoder.gated:
            block.attention_gate.fill_(1)
            block.mlp_gate.fill_(0.5)
    return round_weights(captioner.eval())


def steps_of(captioner: Captioner, *, change=lambda decoder: decoder) -> OnnxSteps:
    encoder, encoder_spec = export_encoder(captioner)
    decoder, decoder_spec = export_decoder(captioner)
    return OnnxSteps(encoder, change(decoder), encoder_spec, decoder_spec, captioner.text)


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_the_graphs_behave_as_the_model(encoder: str) -> None:
    check_graphs(random_captioner(encoder))


@pytest.mark.parametrize(
    ("decoder", "bridge"),
    [
        pytest.param(*pair, marks=() if pair in KINDS else pytest.mark.slow)
        for pair in SYSTEMS
        if pair != ("gpt2", "cross_attention")
    ],
)
def test_the_graphs_of_every_system_behave_as_the_model(decoder: str, bridge: str) -> None:
    check_graphs(random_captioner("timm_vit", bridge, decoder))


def test_a_prefix_that_a_transformer_maps_is_exported_for_any_number_of_images() -> None:
    changes = {"mapper": "transformer", "layers": 1, "heads": 2}
    check_graphs(random_captioner("timm_vit", "prefix", **changes))


def check_graphs(captioner: Captioner) -> None:
    """PyTorch, the graphs and the server over them: the same log-probabilities, lists, captions."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 64, 48, 3), np.uint8)
    generation = Generation(num_beams=4, num_captions=4, max_new_tokens=10)
    encoder, encoder_spec = export_encoder(captioner)
    decoder, decoder_spec = export_decoder(captioner)
    steps = OnnxSteps(encoder, decoder, encoder_spec, decoder_spec, captioner.text)
    parity = compare(TorchSteps(captioner), steps, pixels, generation).check()
    assert parity.captions == parity.captions_equal == 24
    assert parity.n_best_lists == parity.n_best_equal == 27
    assert parity.largest_log_prob_difference < 1e-3
    check_half(Graphs(encoder, encoder_spec, decoder, decoder_spec), steps, pixels, generation)
    manifest = Manifest(
        name="m",
        version="1",
        created="2026-01-01T00:00:00Z",
        description="d",
        licence="l",
        image=captioner.image,
        text=captioner.text,
        encoder=encoder_spec,
        decoder=decoder_spec,
        defaults=generation,
    )
    session = OnnxSession(
        ServedGraphs(encoder, decoder, join_graph(captioner)), manifest, threads=1
    )
    tokenizer = Tokenizer(*train_tokenizer(["a"], vocab_size=300, max_length=14))
    server = ServedCaptioner(manifest, tokenizer, session)
    served = server.caption_batch(pixels, [Params.of(generation)] * len(pixels))
    plain = beam_search(steps, pixels, generation)
    assert [[c.token_ids for c in one] for one in served] == [
        [h.token_ids for h in one] for one in plain
    ]


def check_half(
    graphs: Graphs, floats: OnnxSteps, pixels: np.ndarray, generation: Generation
) -> None:
    """The same in half precision: nothing overflows, and the captions are the same."""
    halves = Fp16().applied(graphs, source=None).steps(TEXT)
    assert all(value.dtype == np.float16 for value in halves.encode(pixels[:2]).values())
    parity = compare(floats, halves, pixels, generation)
    assert parity.captions_equal >= parity.captions - 2  # weights at random leave near ties
    assert 0 < parity.largest_log_prob_difference < 3  # they are sharp, too: of logits of 200


def test_a_graph_that_differs_is_caught() -> None:
    def spoil(body: bytes) -> bytes:
        model = onnx.load_from_string(body)
        largest = max(model.graph.initializer, key=lambda weight: len(weight.raw_data))
        values = onnx.numpy_helper.to_array(largest)
        spoilt = (values * 1.05).astype(values.dtype)
        largest.CopyFrom(onnx.numpy_helper.from_array(spoilt, largest.name))
        return model.SerializeToString()

    captioner = random_captioner("timm_vit")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 48, 3), np.uint8)
    parity = compare(TorchSteps(captioner), steps_of(captioner, change=spoil), pixels, Generation())
    with pytest.raises(ParityError, match="log-probabilities differ"):
        parity.check()


def test_weights_are_stored_without_loss() -> None:
    captioner = random_captioner("timm_vit")
    rounded = {name: tensor.clone() for name, tensor in captioner.state_dict().items()}
    for name, tensor in round_weights(captioner).state_dict().items():
        assert torch.equal(tensor, rounded[name]), f"{name} changes when it is rounded again"
    graph = onnx.load_from_string(export_decoder(captioner)[0]).graph
    by_type = dict.fromkeys(("INT8", "FLOAT16", "FLOAT"), 0)
    for weight in graph.initializer:
        kind = onnx.TensorProto.DataType.Name(weight.data_type)
        by_type[kind] = by_type.get(kind, 0) + int(np.prod(weight.dims))
    matrices = sum(
        tensor.numel()
        for name, tensor in captioner.decoder.named_parameters()
        if tensor.ndim == 2 and "crossattention.c_attn" not in name  # that is the encoder graph's
    )
    assert by_type["INT8"] == matrices
    assert by_type["FLOAT"] < matrices / 8  # scales, biases and norms


def test_what_does_not_fit_fewer_bits_stays_as_it_is() -> None:
    values = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)
    body = compress(matrix_product(values))
    (weight,) = onnx.load_from_string(body).graph.initializer
    assert np.array_equal(onnx.numpy_helper.to_array(weight), values)


@pytest.mark.parametrize("transposed", [False, True])
def test_int8_rows_come_back_bit_for_bit(transposed: bool) -> None:
    draw = np.random.default_rng(0)
    scale = (1.5703125 * 2.0 ** draw.integers(-30, 4, (40, 1))).astype(np.float32)
    values = draw.integers(-127, 128, (40, 40)).astype(np.float32) * scale
    values[:, 7], values[3] = 127 * scale[:, 0], 0  # every row has a largest; one is all zeros
    values = np.ascontiguousarray(values.T if transposed else values)
    body = compress(matrix_product(values))
    session = onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": np.eye(40, dtype=np.float32)})
    assert len(body) < values.size * 1.6
    assert np.array_equal(out, values)


def matrix_product(values: np.ndarray) -> onnx.ModelProto:
    """The graph y = x @ values, with a weight that nothing uses."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", kind, ["n", values.shape[0]])],
        [helper.make_tensor_value_info("y", kind, ["n", values.shape[1]])],
        [onnx.numpy_helper.from_array(values, n) for n in ("w", "unused")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_weights_too_large_for_half_precision_are_refused() -> None:
    captioner = random_captioner("timm_vit")
    with torch.no_grad():
        captioner.bridge.norm.bias[0] = 1e5
    with pytest.raises(ParityError, match=r"bridge\.norm\.bias does not fit"):
        round_weights(captioner)


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.name)
def test_trainer_and_server_see_the_same_pixels(path: Path) -> None:
    spec = ImageSpec(height=96, width=80)
    limits = ImageLimits(max_pixels=40_000_000)
    assert np.array_equal(load_pixels(path, spec), decode_image(path.read_bytes(), spec, limits))


def test_the_server_s_captions_are_the_trainer_s(exported: tuple[Path, Path]) -> None:
    run, bundle = exported
    served = ServedCaptioner.load(bundle, threads=1)
    captioner = round_weights(finetune_captioner(run))
    pixels = np.random.default_rng(1).integers(0, 256, (12, 64, 48, 3), np.uint8)
    for beams in (1, 3, 5):
        generation = Generation(num_beams=beams, num_captions=beams, max_new_tokens=12)
        ours = beam_search(TorchSteps(captioner), pixels, generation)
        theirs = served.caption_batch(pixels, [Params.of(generation)] * len(pixels))
        for first, second in zip(ours, theirs, strict=True):
            assert [h.token_ids for h in first] == [c.token_ids for c in second]
            assert [h.score for h in first] == pytest.approx([c.score for c in second], abs=1e-4)


def finetune_captioner(run: Path) -> Captioner:
    return export.Run(run).captioner()


def test_a_failed_check_writes_no_bundle(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    run, _ = exported
    differing = Parity(1e-5, 1.0, n_best_lists=9, n_best_equal=9, captions=3, captions_equal=2)
    monkeypatch.setattr(export, "compare", lambda *_, **__: differing)
    card = {"description": "d", "data": "d", "licence": "l", "failures": "f"}
    table = {"run": run, "name": "photos", "data": run.parent / "photos.csv", "card": card}
    with pytest.raises(ParityError, match="2 of 3 captions are equal"):
        export.run(export.Config.model_validate(table), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused_before_the_work(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    run, bundle = exported
    card = {"description": "d", "data": "d", "licence": "l", "failures": "f"}
    table = {"run": run, "name": "photos", "data": run.parent / "photos.csv", "card": card}
    with pytest.raises(ConfigError, match="bundle exists already"):
        export.run(export.Config.model_validate(table), bundle.parent)
    twin = tmp_path / PHOTOS[0].name
    twin.write_bytes(PHOTOS[1].read_bytes())
    for golden, message in (
        ([tmp_path / "no.jpg"], r"no\.jpg: no such file"),
        ([PHOTOS[0], twin], "two of the pictures have one name"),
    ):
        with pytest.raises(TrainerError, match=message):
            export.run(export.Config.model_validate({**table, "golden": golden}), tmp_path)
    with pytest.raises(ValidationError, match="no model name"):
        export.Config.model_validate({**table, "name": "My Photos"})


def test_an_evaluation_compares_with_other_images_only(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    run, _ = exported
    data = run.parent / "photos.csv"
    table = {"model": run, "data": data, "neighbours": data}
    with pytest.raises(DataError, match="4 images are in both neighbours and data"):
        evaluate.run(evaluate.Config.model_validate(table), tmp_path)
    table = {"model": run, "data": data, "generation": {"num_beam": 3}}
    with pytest.raises(ConfigError, match=r"unknown key 'num_beam'; the keys are .*num_beams"):
        evaluate.run(evaluate.Config.model_validate(table), tmp_path)


@pytest.mark.parametrize("kind", ["run", "bundle"])
def test_an_evaluation_of_a_run_or_a_bundle_has_neighbours_beside_it(
    exported: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    run, bundle = exported
    rows = ["image,caption"]
    for path in PHOTOS:  # mirrored: other images, whose nearest neighbours are known
        with Image.open(path) as photo:
            ImageOps.mirror(photo.convert("RGB")).save(tmp_path / path.name)
        rows.append(f"{tmp_path / path.name},the {path.stem} in the mirror")
    (tmp_path / "mirrored.csv").write_text("\n".join(rows))
    table = {
        "model": run if kind == "run" else bundle,
        "data": run.parent / "photos.csv",
        "neighbours": tmp_path / "mirrored.csv",
    }
    evaluate.run(evaluate.Config.model_validate(table), tmp_path / kind)
    written = json.loads((tmp_path / kind / "figures.json").read_text())
    assert {"figures", "neighbours", "gain"} <= set(written)


def test_a_blend_lies_between_a_run_and_its_start(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    run, _ = exported
    start = Run(run)
    second = start.recipe.model_copy(
        update={"start": run, "loop": start.recipe.loop.model_copy(update={"epochs": 4})}
    )
    finetune.run(second, tmp_path)
    ends = [Run(folder).captioner().state_dict() for folder in (run, tmp_path)]
    blended = export.blended(Run(tmp_path), 0.25).state_dict()
    for name, tensor in blended.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.lerp(ends[0][name], ends[1][name], 0.25))
    assert not torch.equal(ends[0]["bridge.position"], ends[1]["bridge.position"])
    weights = {**second.encoder, "weights": str(tmp_path / "some.pth")}
    moved = Run(tmp_path)
    moved.recipe = second.model_copy(update={"start": tmp_path / "gone", "encoder": weights})
    told = recipe_of(moved)
    assert (told["start"], told["encoder"]["weights"]) == ("gone", "some.pth")
    with pytest.raises(ConfigError, match="started from no other run"):
        export.blended(start, 0.5)


def test_a_bundle_tells_where_it_came_from_and_no_path(exported: tuple[Path, Path]) -> None:
    run, folder = exported
    bundle = Bundle.open(folder)
    provenance = bundle.manifest.provenance
    assert provenance["parity"]["captions_equal"] == provenance["parity"]["captions"] == len(PHOTOS)
    assert provenance["recipe"]["data"]["train"] == "photos.csv"
    for name, body in bundle.files().items():
        assert str(run.parent).encode() not in body, name
        assert b"site-packages" not in body, name
    card = bundle.read("MODEL_CARD.md").decode()
    assert "| CIDEr-D |" in card and "$" not in card
    assert f"of {len(PHOTOS)} captions as they were" in card


def test_a_figure_without_a_value_is_null(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = exported
    lone = tmp_path / "lone.csv"
    lone.write_text(f"image,caption\n{PHOTOS[0].resolve()},a photograph\n")
    with pytest.warns(UserWarning, match="CIDEr"):
        evaluate.run(evaluate.Config.model_validate({"model": run, "data": lone}), tmp_path)
    body = (tmp_path / "figures.json").read_text()
    assert "NaN" not in body
    assert json.loads(body)["figures"]["CIDEr-D"][0] is None
