"""The whole state of a run in one safetensors file, written atomically and checked when read."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.errors import CheckpointError

CHECKPOINT = "last.safetensors"


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes `tensors` and the JSON-able `state`; a crash leaves the old file or the new one.

    Raises:
        CheckpointError: the disk refused (full, read-only); the old file is still there.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    checksums = {name: _checksum(tensor) for name, tensor in contiguous.items()}
    metadata = {"state": json.dumps(dict(state)), "crc32": json.dumps(checksums)}
    temporary = path.with_name(f".{path.name}.tmp")  # the same each time: a crash leaves one
    try:
        save_file(contiguous, temporary, metadata=metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: cannot write the checkpoint ({error}); the one before, if any, is untouched"
        ) from error


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns what `save_checkpoint` was given.

    Raises:
        CheckpointError: no such file, half a file, or a tensor whose checksum differs.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint ({error})") from error
    if not metadata or "crc32" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but no checkpoint of this trainer")
    checksums = json.loads(metadata["crc32"])
    for name, tensor in tensors.items():
        if checksums[name] != _checksum(tensor):
            raise CheckpointError(f"{path}: tensor {name} is damaged; use an older checkpoint")
    return tensors, json.loads(metadata["state"])


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns an optimiser's per-parameter tensors under flat names, `<index>.<field>`."""
    rows = optimizer.state_dict()["state"]
    return {
        f"{index}.{field}": torch.as_tensor(value)
        for index, row in rows.items()
        for field, value in row.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts `pack_optimizer`'s tensors back; the groups keep the options they were built with."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, field = name.partition(".")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            # In the parameter's own layout: a fused step goes through memory, not through indices.
            tensor = torch.empty_like(parameter).copy_(tensor)
        state.setdefault(int(index), {})[field] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
