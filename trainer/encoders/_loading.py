"""Giving a timm backbone the weights of another place, and saying what fitted."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from trainer.encoders._state_dicts import TIMM_NAMES, Named, recognise
from trainer.encoders._weights_file import WeightsFile, read_weights
from trainer.errors import CheckpointError

_UNKNOWN = "names that are not known"


def load_backbone(backbone: Any, source: str, *, partial: bool = False) -> None:
    """Loads the tensors that `source` names, and prints what was loaded and what was not.

    Tensors are matched by name (see `recognise`), and embeddings of positions resampled to the
    backbone's grid. Where names are not known they are matched by order, as ports of one
    architecture keep the order of its layers but not their names; the order is trusted only when
    every tensor in it has the shape that the backbone expects. BatchNorm's step counters are left
    out.

    Args:
        backbone: built by timm.
        source: as `weights` of `[encoder]`.
        partial: load what fits where not all does; the rest stays as it is.

    Raises:
        ConfigError: no such file, folder or package.
        CheckpointError: the file cannot be read, or a tensor is missing or of another shape.
    """
    load_tensors(backbone, read_weights(source), partial=partial)


def load_tensors(backbone: Any, file: WeightsFile, *, partial: bool = False) -> None:
    """Loads the tensors of a file that was read; see `load_backbone`.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    wanted = {k: v for k, v in backbone.state_dict().items() if not _is_counter(k)}
    fit = _fit(backbone, wanted, file)
    problems = fit.problems(len(wanted), exact=file.from_run)
    if not fit.loaded:
        raise CheckpointError(f"{file.path}: {problems}: these are weights of another architecture")
    if problems and not partial:
        raise CheckpointError(
            f"{file.path}: {problems}; to load the {len(fit.loaded)} that fit, set partial = true "
            "in [encoder]"
        )
    backbone.load_state_dict(fit.loaded, strict=False)
    print(f"{file.path}: loaded {len(fit.loaded)} of {len(wanted)} tensors (from {fit.origin})")
    for line in fit.details():
        print(f"  {line}")


@dataclass(frozen=True, slots=True)
class _Fit:
    """How a file's tensors go with those that a backbone wants.

    Attributes:
        origin: What the file's names are.
        loaded: The tensors that fit, by the backbone's names.
        resized: Those of them that had another size in the file, with both.
        missing: The backbone's names that the file has not.
        misshapen: Those that are of another shape, with both.
        unused: What else is in the file.
    """

    origin: str
    loaded: dict[str, Tensor]
    resized: list[str]
    missing: list[str]
    misshapen: list[str]
    unused: list[str]

    def problems(self, wanted: int, *, exact: bool) -> str:
        """Returns in what it is another architecture; `exact` minds what is left over too."""
        found = []
        if self.missing:
            found.append(
                f"{len(self.missing)} of {wanted} tensors missing (first {self.missing[0]})"
            )
        if self.misshapen:
            found.append(f"{len(self.misshapen)} of another shape (first {self.misshapen[0]})")
        if exact and self.unused:
            found.append(f"{len(self.unused)} more than the model has (first {self.unused[0]})")
        return "; ".join(found)

    def details(self) -> list[str]:
        """Returns a line for each kind of tensor that was not just copied."""
        kinds = {
            "resized to this model": self.resized,
            "missing, left as they are": self.missing,
            "of another shape, left as they are": self.misshapen,
            "not needed": self.unused,
        }
        return [
            f"{kind}: {len(names)} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})"
            for kind, names in kinds.items()
            if names
        ]


def _compare(wanted: Mapping[str, Tensor], named: Named, adapted: Mapping[str, Tensor]) -> _Fit:
    """Returns the fit of `adapted`, which is what timm made of the tensors in `named`."""
    loaded: dict[str, Tensor] = {}
    resized, misshapen = [], []
    for name, target in wanted.items():
        if name not in adapted:
            continue
        value = adapted[name]
        if value.shape == target.shape:
            loaded[name] = value
            before = named.tensors.get(named.aliases.get(name, name), value)
            if before.numel() != value.numel():
                resized.append(f"{name}: {tuple(before.shape)} to {tuple(value.shape)}")
        else:
            misshapen.append(
                f"{name}: found {tuple(value.shape)}, the model needs {tuple(target.shape)}"
            )
    missing = [name for name in wanted if name not in adapted]
    own = [name for name in adapted if name not in wanted and not _is_counter(name)]
    return _Fit(named.origin, loaded, resized, missing, misshapen, own + named.outside)


def _fit(backbone: Any, wanted: Mapping[str, Tensor], file: WeightsFile) -> _Fit:
    if file.from_run:
        named = Named("a run of this trainer", file.tensors)
        tensors = file.tensors | _resampled_positions(backbone, file)
        states = [tensors, _filtered(backbone, tensors)]
    else:
        named = recognise(file.tensors, wanted) or Named(_UNKNOWN, file.tensors)
        # The filter first: it knows grids of another form that have as many patches.
        states = [_filtered(backbone, named.tensors), named.tensors]
    fits = [_compare(wanted, named, state) for state in states]
    if named.origin == _UNKNOWN or named.origin.startswith(TIMM_NAMES):
        ordered = Named("the order of its tensors", file.tensors)
        fits.append(_compare(wanted, ordered, _in_order(wanted, file.tensors)))
    return max(fits, key=lambda fit: len(fit.loaded))  # the first of equals


def _filtered(backbone: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what timm makes of another library's state dict for this model.

    It knows further names, and resizes embeddings of positions and patches. Names that are right
    already may suffer.
    """
    module = sys.modules[type(backbone).__module__]
    change = getattr(module, "checkpoint_filter_fn", None)
    if change is None:
        return dict(tensors)
    try:
        return change(dict(tensors), backbone)
    except Exception:  # of whatever kind: it met tensors that it was not written for
        return dict(tensors)


def _resampled_positions(backbone: Any, file: WeightsFile) -> dict[str, Tensor]:
    """Returns a run's embeddings of positions on the backbone's grid, where both are known.

    timm's filter takes every grid for a square.
    """
    positions, kernel = (file.tensors.get(k) for k in ("pos_embed", "patch_embed.proj.weight"))
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if file.image_size is None or positions is None or kernel is None or grid is None:
        return {}
    (height, width), patch = file.image_size, kernel.shape[-2:]
    old = (height // patch[0], width // patch[1])
    prefix = backbone.pos_embed.shape[1] - grid[0] * grid[1]
    if positions.shape[1] != prefix + old[0] * old[1]:
        return {}
    return {"pos_embed": resample_abs_pos_embed(positions, grid, old, num_prefix_tokens=prefix)}


def _in_order(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the file's first tensors by the wanted names, or none where a shape differs."""
    values = [value for name, value in found.items() if not _is_counter(name)]
    agree = len(values) >= len(wanted) and all(
        value.shape == target.shape for value, target in zip(values, wanted.values(), strict=False)
    )
    return dict(zip(wanted, values, strict=False)) if agree else {}


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
