"""Graphs that reach outside of themselves are refused before ONNX Runtime sees them."""

import os
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exports.bundle import Bundle, write_bundle
from exports.registry import DEFAULT_REGISTRY, Registry
from serving.captioner import Captioner
from serving.errors import BundleRejected
from serving.onnx_walk import _CHILDREN, check_graph


def tensor(**changes):
    made = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def model(*nodes, initializers=()):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes) or [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, [4])],
        [value("y", TensorProto.FLOAT, [4])],
        initializer=list(initializers),
    )
    domains = {"", *(node.domain for node in nodes)}
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(domain, 20 if not domain else 1) for domain in domains],
    )


def external(location):
    made = tensor()
    made.ClearField("raw_data")
    made.data_location = TensorProto.EXTERNAL
    entry = made.external_data.add()
    entry.key, entry.value = "location", location
    return made


def in_a_branch(inner):
    """Returns a node that has a tensor two graphs down."""
    value = helper.make_tensor_value_info
    constant = helper.make_node("Constant", [], ["z"], value=inner)
    branch = helper.make_graph([constant], "b", [], [value("z", TensorProto.FLOAT, [4])])
    node = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    outer = helper.make_graph([node], "a", [], [value("z", TensorProto.FLOAT, [4])])
    return helper.make_node("If", ["c"], ["y"], then_branch=outer, else_branch=outer)


def sparse(inner):
    indices = numpy_helper.from_array(np.array([0]), "i")
    return helper.make_node(
        "Constant", [], ["y"], sparse_value=helper.make_sparse_tensor(inner, indices, [4])
    )


def with_function(domain, node):
    made = model()
    function = helper.make_function(
        domain, "F", ["x"], ["y"], [node], [helper.make_opsetid("", 20)]
    )
    made.functions.append(function)
    return made


def with_training(inner):
    made = model()
    made.training_info.add().algorithm.initializer.append(inner)
    return made


LOCATIONS = ["weights.bin", "/etc/passwd", "../../etc/passwd", "link.bin", "", "\\\\host\\share"]
OUTSIDE = {
    **{f"a file {at}": model(initializers=[external(at)]) for at in LOCATIONS},
    "a location without entries": model(initializers=[tensor(data_location=1)]),
    "in a branch": model(in_a_branch(external("a"))),
    "in a list of an attribute": model(helper.make_node("X", ["x"], ["y"], values=[external("a")])),
    "in a sparse value": model(sparse(external("a"))),
    "in a function": with_function(
        "pkg.a", helper.make_node("Constant", [], ["y"], value=external("a"))
    ),
    "in a training step": with_training(external("a")),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_tensor_in_another_file_is_refused(case):
    with pytest.raises(BundleRejected, match="the decoder keeps a tensor in another file"):
        check_graph("the decoder", OUTSIDE[case].SerializeToString())


FOREIGN = {
    "a library's": model(helper.make_node("Run", ["x"], ["y"], domain="my.library")),
    "one that opens files": model(
        helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")
    ),
    "in a function": with_function("pkg.a", helper.make_node("Run", ["x"], ["y"], domain="evil")),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_operator_is_refused(case):
    with pytest.raises(BundleRejected, match=r"the encoder has the operator '(Run|EPContext)' of"):
        check_graph("the encoder", FOREIGN[case].SerializeToString())


def test_what_the_trainer_writes_passes(tiny_bundles):
    for path in (tiny_bundles.matching, Registry(DEFAULT_REGISTRY).resolve("cutline-base").path):
        files = Bundle.open(path).files()
        graphs = [body for name, body in files.items() if name.endswith(".onnx")]
        assert len(graphs) >= 3
        for body in graphs:
            check_graph("it", body)
    inside = with_function("pkg.onnxscript", helper.make_node("Identity", ["x"], ["y"]))
    check_graph("it", inside.SerializeToString())
    check_graph("it", model(in_a_branch(tensor())).SerializeToString())


def test_the_walk_follows_every_way_to_a_tensor_or_a_node():
    """The numbers of the fields are those of the schema that `onnx` has."""
    names = {
        "model": onnx.ModelProto, "training": onnx.TrainingInfoProto, "graph": onnx.GraphProto,
        "function": onnx.FunctionProto, "node": onnx.NodeProto, "attribute": onnx.AttributeProto,
        "sparse": onnx.SparseTensorProto, "tensor": onnx.TensorProto,
    }  # fmt: skip
    kinds = {message.DESCRIPTOR.name: kind for kind, message in names.items()}
    for kind, message in names.items():
        children = {
            field.number: kinds[field.message_type.name]
            for field in message.DESCRIPTOR.fields
            if field.message_type is not None and field.message_type.name in kinds
        }
        assert _CHILDREN[kind] == children
    by_name = onnx.NodeProto.DESCRIPTOR.fields_by_name
    assert (by_name["op_type"].number, by_name["domain"].number) == (4, 7)
    by_name = onnx.TensorProto.DESCRIPTOR.fields_by_name
    assert (by_name["external_data"].number, by_name["data_location"].number) == (13, 14)


# A tensor's field 14 with a value whose low 32 bits alone are 1: some readers look no further.
SLY_LOCATION = bytes([0x70, 0x81, 0x80, 0x80, 0x80, 0x10])


def wrapped(inner):
    """Returns a file that has one graph with one tensor of these bytes."""
    graph = bytes([0x2A, len(inner)]) + inner
    return bytes([0x3A, len(graph)]) + graph


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no graph"),
        (b"not a protocol buffer", "no ONNX file"),
        (b"\x08\x0a", "no graph"),
        (wrapped(b"")[:-1], "cut off"),
        (b"\x3a\xff\xff\xff\xff\x7f", "cut off"),
        (b"\x08" + b"\xff" * 11, "no end"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x00\x01", "number"),
        (bytes([0xBA, 0x80, 0x80, 0x80, 0x80, 0x01]) + b"\x00", "number"),
        (wrapped(SLY_LOCATION), "another file"),
        (wrapped(b"\x6a\x00"), "another file"),
        (b"\x1c\x00\x00\x00ORTM" + bytes(24), "own format"),
    ],
)
def test_what_is_no_onnx_file_is_refused(body, words):
    with pytest.raises(BundleRejected, match=words):
        check_graph("the join", body)


def test_many_nodes_take_seconds_and_deep_graphs_no_stack():
    deep = b""
    for _ in range(2000):  # graph -> node -> attribute -> graph
        deep = field(1, field(5, field(6, deep)))
    start = time.process_time()
    check_graph("it", field(7, deep))
    check_graph("it", field(7, b"\x0a\x00" * 30_000))
    assert time.process_time() - start < 5


def field(number, body):
    length, size = bytearray(), len(body)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | 2]) + bytes(length) + body


@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_a_bundle_whose_graph_points_outside_is_refused_and_ort_not_called(
    tmp_path, tiny_bundles, monkeypatch, how
):
    good = Bundle.open(tiny_bundles.one)
    graph = onnx.load_from_string(good.read("encoder.onnx"))
    graph.graph.initializer.append(external("weights.bin"))
    files = {**good.files(), "encoder.onnx": graph.SerializeToString(), "weights.bin": b"secret"}
    path = tmp_path / "bundle"
    write_bundle(path, good.manifest, files)
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    (path / "weights.bin").unlink()
    if how == "symbolic":
        (path / "weights.bin").symlink_to(outside)
    else:
        os.link(outside, path / "weights.bin")

    def called(*_, **__):
        raise AssertionError("ONNX Runtime was called")

    monkeypatch.setattr("serving.session.ort.InferenceSession", called)
    words = "symbolic link" if how == "symbolic" else "the encoder keeps a tensor in another file"
    with pytest.raises(BundleRejected, match=words):
        Captioner.load(path, threads=1)


def test_what_was_hashed_is_what_is_loaded(tmp_path, tiny_bundles, monkeypatch):
    """The files are read once: what is swapped in after the check is never loaded."""
    path = tmp_path / "bundle"
    good = Bundle.open(tiny_bundles.one)
    write_bundle(path, good.manifest, good.files())
    opened = Bundle.open

    def open_then_swap(place):
        bundle = opened(place)
        for name in ("encoder.onnx", "decoder.onnx", "join.onnx", "tokenizer.json"):
            (path / name).write_bytes(b"swapped in")
        return bundle

    monkeypatch.setattr("serving.captioner.Bundle.open", open_then_swap)
    assert Captioner.load(path, threads=1).version == "1"
