"""A bundle's weights, back in the captioner that they were exported from.

A bundle keeps the recipe of its captioner, so that the captioner can be built anew; of its weights
the graphs keep what is computed with them, in integers maybe, some without their names. They are
found by two rules:

1. Products with constants (Conv, Gemm, MatMul) come in the order of a walk from the outputs. The
   captioner runs once, and the same walk through the graph of its gradients meets the same ones.
2. Everything else goes by its name, which graphs keep. What has none is missing: tanh(gate) is a
   constant of a graph, but the gate is not; so T5 and gated readers cannot be read back.

BatchNorm has gone into the convolution before it. It is left in place, but does nothing beyond
what the graph does: mean 0, variance 1, weight 1, and the folded bias; that is right while it stays
in evaluation mode, as `finetune` has it. Weights from integers are what the integers stand for.

Nothing is believed: the captioner must give the golden captions the scores that the bundle says.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from exports.bundle import Bundle
from exports.images import preprocess
from trainer.attention import Memory
from trainer.captioner import Captioner
from trainer.config import validate
from trainer.errors import CheckpointError
from trainer.folding import PIXELS, Graph, attributes
from trainer.run import Data, Recipe, build_captioner

Array = NDArray[Any]
_PREFIX = "captioner."  # of names in graphs
_TOLERANCE = 0.05  # of a golden caption's score: activations in integers differ by a tenth of it
_PRODUCTS = ("Conv", "Gemm", "MatMul", "MatMulIntegerToFloat")


def unpack(bundle: Bundle) -> tuple[Recipe, Captioner]:
    """Returns the recipe of a bundle's captioner, and the captioner, in evaluation mode.

    Raises:
        CheckpointError: the bundle does not say how its captioner is built, or its graphs are not
            what this version of the trainer would export of it.
    """
    manifest, where = bundle.manifest, bundle.path
    table: Any = manifest.provenance.get("recipe")
    if table is None:
        raise CheckpointError(
            f"{where}: does not say how its captioner is built (it was imported); import the "
            "folder that transformers saved"
        )
    data = {key: value for key, value in table["data"].items() if key in Data.model_fields}
    # Updates of low rank are in the weights by now.
    table = {**table, "data": data, "start": None, "lora": None}
    recipe = validate(Recipe, table, f"{where}: provenance")
    captioner = build_captioner(recipe, manifest.text, pretrained=False).eval()
    target = _Target.of(captioner)
    names = [manifest.encoder.file, manifest.decoder.file]
    if manifest.matcher is not None:
        names.append(manifest.matcher.file)
    for name, uses in zip(names, target.uses, strict=True):
        graph = _Constants.of(bundle.read(name))
        try:
            target.take(graph, uses)
        except _Unlike as error:
            raise CheckpointError(f"{where}: cannot be read back: {name} {error}") from None
    if left := target.left():
        raise CheckpointError(
            f"{where}: cannot be read back: {len(left)} weights are not in its graphs under a name "
            f"(first {left[0]})"
        )
    _check(captioner, bundle)
    return recipe, captioner


class _Unlike(Exception):
    """A graph is not that of the captioner; says in what."""


class _Use(NamedTuple):
    """A product that a captioner computes with a weight of its own."""

    weight: Tensor
    bias: Tensor | None
    is_transposed: bool
    """Whether the weight is (D_out, D_in); that of a convolution is as graphs have it."""
    norm: Any = None
    """The BatchNorm that the product goes into."""


class _Product(NamedTuple):
    """A product of a graph with constants: of a matrix (D_in, D_out), or a convolution's kernel."""

    weight: Array
    bias: Array | None
    reads_pixels: bool


@dataclass(frozen=True, slots=True)
class _Constants:
    """What a graph computes with: products in order, other constants by name."""

    products: list[_Product]
    named: Mapping[str, Array]

    @classmethod
    def of(cls, body: bytes) -> "_Constants":
        graph = Graph(onnx.load_from_string(body))
        known: dict[str, Array] = dict(graph.constants)
        products = []
        # Nodes by their place: those of onnx are not hashable.
        makers = {name: place for place, node in enumerate(graph.nodes) for name in node.output}
        last = [makers[output.name] for output in graph.model.graph.output]

        def before(place: int) -> Iterable[int]:
            return (makers[name] for name in graph.nodes[place].input if name in makers)

        for node in (graph.nodes[place] for place in _in_order(last, before)):
            if all(name in known for name in node.input):
                known |= _widened(node, known)
            elif node.op_type in _PRODUCTS and node.input[1] in known:
                products.append(_product(node, known))
        return cls(products, known)

    def get(self, name: str) -> Array | None:
        """Returns a constant by the name of its weight, however it is stored."""
        whole = f"{_PREFIX}{name}"
        return next(
            (self.named[one] for one in (whole, f"{whole}.half") if one in self.named), None
        )


def _in_order(last: Sequence[Any], before: Callable[[Any], Iterable[Any]]) -> list[Any]:
    """Returns all nodes that lead to the last ones, each once and behind all that it reads.

    The order is that of a walk from the outputs: one for all graphs that compute the same, however
    their nodes are listed.
    """
    found: dict[Any, None] = {}
    waiting = [(node, False) for node in reversed(last)]
    while waiting:
        node, is_read = waiting.pop()
        if node in found:
            continue
        if is_read:
            found[node] = None
            continue
        waiting.append((node, True))
        waiting += [(one, False) for one in reversed(list(before(node)))]
    return list(found)


def _gradients_before(node: Any) -> list[Any]:
    return [one for one, _ in node.next_functions if one is not None]


def _widened(node: onnx.NodeProto, known: Mapping[str, Array]) -> dict[str, Array]:
    """Returns what a node makes of constants, by name; nothing if it is none that widens them."""
    values = [known[name] for name in node.input]
    if node.op_type == "Cast":
        return {node.output[0]: values[0].astype(np.float32)}
    if node.op_type == "Mul":
        return {node.output[0]: values[0] * values[1]}
    if node.op_type != "DequantizeLinear":
        return {}
    shape = [1] * values[0].ndim
    if values[1].ndim:
        shape[attributes(node).get("axis", 1)] = -1
    scale, zero = (one.reshape(shape) for one in values[1:])
    whole = values[0].astype(np.float64) - zero.astype(np.float64)
    return {node.output[0]: (whole * scale).astype(np.float32)}


def _product(node: onnx.NodeProto, known: Mapping[str, Array]) -> _Product:
    integer = node.op_type == "MatMulIntegerToFloat"
    weight = known[node.input[1]].astype(np.float32)
    if integer:
        weight = weight * known[node.input[3]]
    elif attributes(node).get("transB"):
        weight = weight.T
    place = 6 if integer else 2
    bias = known.get(node.input[place]) if len(node.input) > place else None
    return _Product(weight, bias, reads_pixels=node.input[0] == PIXELS)


@dataclass
class _Target:
    """A captioner to be filled, and the products that each of its graphs computes, in order."""

    captioner: Captioner
    uses: list[list[_Use]]
    asked: set[int]
    """Addresses of the weights that graphs compute with."""
    done: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, captioner: Captioner) -> "_Target":
        """Returns a captioner, watched while it runs as its graphs do."""
        size = (1, 3, captioner.image.height, captioner.image.width)
        token_ids = torch.full((1, 2), captioner.text.bos_id)
        with _Watch(captioner) as watch:
            encoded = captioner.encoded(torch.zeros(size))
            given = {name: value.detach() for name, value in encoded.items()}
            memory = Memory.of(given)
            results = [list(encoded.values()), [captioner.decoder(token_ids, memory)]]
            if captioner.matcher is not None:
                lengths, image = torch.tensor([2]), torch.tensor([0])
                results.append(list(captioner.match(token_ids, lengths, image, given)))
        uses, asked = [], set()
        for tensors in results:
            nodes = _in_order([tensor.grad_fn for tensor in tensors], _gradients_before)
            uses.append([watch.uses[node] for node in nodes if node in watch.uses])
            asked |= {n.variable.data_ptr() for n in nodes if hasattr(n, "variable")}
        return cls(captioner, uses, asked)

    @torch.no_grad()
    def take(self, graph: _Constants, uses: list[_Use]) -> None:
        """Fills in what a graph has.

        Raises:
            _Unlike: its products are not those of `uses`.
        """
        if len(graph.products) != len(uses):
            raise _Unlike(f"has {len(graph.products)} products with weights, not {len(uses)}")
        # First by name: of a tied weight (embedding and head) that may be the better copy.
        for name, tensor in self.captioner.state_dict().items():
            value = graph.get(name)
            if value is not None and value.shape == tuple(tensor.shape):
                self._put(tensor, value)
        for number, (product, use) in enumerate(zip(graph.products, uses, strict=True), 1):
            self._fill(number, product, use)

    def left(self) -> list[str]:
        """Returns the names of the weights that graphs compute with and that nothing filled."""
        missing = self.asked - self.done
        return [n for n, one in self.captioner.named_parameters() if one.data_ptr() in missing]

    def _fill(self, number: int, product: _Product, use: _Use) -> None:
        weight = product.weight.T if use.is_transposed else product.weight
        place = f"product {number}"
        self._check_shape(place, weight, use.weight)
        if product.reads_pixels:
            # The normalisation of pixels is in the kernel; what stands for 0 is theirs (`folding`).
            weight = weight * self.captioner.encoder.std.numpy()
        self._put(use.weight, weight)
        if product.bias is None:
            return
        if use.bias is not None:
            self._check_shape(place, product.bias, use.bias)
            self._put(use.bias, product.bias)
        elif use.norm is not None:
            self._check_shape(place, product.bias, use.norm.bias)
            if use.norm.bias.data_ptr() not in self.done:  # else it is in the graph, by name
                self._still(use.norm, product.bias)
        else:
            raise _Unlike(f"adds a bias to {place}, where the captioner adds none")

    def _check_shape(self, place: str, value: Array, tensor: Tensor) -> None:
        if value.shape != tuple(tensor.shape):
            raise _Unlike(f"has {value.shape} in {place}, not {tuple(tensor.shape)}")

    def _still(self, norm: Any, bias: Array) -> None:
        """Has a BatchNorm add a bias, and nothing else."""
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
        self._put(norm.weight, np.ones(len(bias), np.float32))
        self._put(norm.bias, bias)

    def _put(self, tensor: Tensor, value: Array) -> None:
        if tensor.data_ptr() not in self.done:
            tensor.copy_(torch.tensor(value))
            self.done.add(tensor.data_ptr())


class _Watch(TorchFunctionMode):
    """Notes the products that are computed with parameters of a captioner.

    Attributes:
        uses: by the node of the gradient's graph that stands for the product.
    """

    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.uses: dict[Any, _Use] = {}
        self._own = {one.data_ptr() for one in captioner.parameters()}
        self._norms = {
            one.bias.data_ptr(): one
            for one in captioner.modules()
            if isinstance(one, nn.modules.batchnorm._BatchNorm)
        }

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in (functional.linear, functional.conv2d, torch.conv2d):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self._note(result, args[1], bias, function is functional.linear)
        elif function is torch.addmm:
            self._note(result, args[2], args[0], False)
        elif function in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            self._note(result, args[1], None, False)
        elif function is functional.batch_norm:
            bias = args[4] if len(args) > 4 else kwargs["bias"]
            norm, before = self._norms.get(bias.data_ptr()), args[0].grad_fn
            if norm is not None and before in self.uses:
                self.uses[before] = self.uses[before]._replace(norm=norm)
        return result

    def _note(self, result: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> None:
        if weight.data_ptr() in self._own:
            self.uses[result.grad_fn] = _Use(weight, bias, transposed)


@torch.no_grad()
def _check(captioner: Captioner, bundle: Bundle) -> None:
    """Has a captioner score the golden captions.

    Raises:
        CheckpointError: a score is not what the bundle says.
    """
    manifest = bundle.manifest
    for golden in manifest.golden:
        with Image.open(io.BytesIO(bundle.read(golden.image))) as image:
            pixels = torch.from_numpy(preprocess(image, manifest.image)[None]).permute(0, 3, 1, 2)
        ids = [manifest.text.bos_id, *manifest.prompt_ids, *golden.token_ids]
        logits = captioner(pixels, torch.tensor([ids[:-1]]))[0, -len(golden.token_ids) :]
        chosen = torch.tensor(golden.token_ids)[:, None]
        total = logits.log_softmax(-1).gather(1, chosen).sum()
        score = float(total) / len(chosen) ** manifest.defaults.length_penalty
        if not abs(score - golden.score) <= _TOLERANCE:
            raise CheckpointError(
                f"{bundle.path}: cannot be read back: {golden.text!r} scores {score:.3f}, not "
                f"{golden.score:.3f} as the bundle says"
            )
