"""Lets torchvision import beside a PyTorch that its compiled operators were not built for.

torchvision's wheel on PyPI is built against the CUDA build of PyTorch. Beside a CPU build its
extension does not load, and `import torchvision` raises because it registers a shape function for
`torchvision::nms`, an operator that nobody defined. timm and transformers import torchvision, so
the whole trainer would fail over operators of object detection that captioning never calls.
Declaring the two schemas, only where the real ones are absent, cures it; `trainer/__init__.py`
imports this module before anything else can import torchvision.
"""

import importlib.util
from pathlib import Path

import torch


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to mend
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")


if not _compiled_operators_load():
    _library = torch.library.Library("torchvision", "DEF")  # kept: its death undefines the schemas
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
