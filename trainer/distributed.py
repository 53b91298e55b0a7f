"""Several workers that train as one: each takes its part of every batch.

Every worker holds the whole model, draws its rows of the same batches, and averages the gradients
with the others after each step. Losses that compare the images of a batch see the embeddings of all
(`gathered`), BatchNorm the statistics of all (`synchronise_norms`), so that two workers learn what
one would from the same batches. All of it does nothing where there is one process.

Gradients flow through both collectives. What they compute is the gradient of the sum of all
workers' losses; `average_gradients` divides it by their number.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer import variants
from trainer.config import validate
from trainer.errors import ConfigError


def world_size() -> int:
    """How many workers there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first one writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Waits for the others."""
    if dist.is_initialized():
        dist.barrier()


def worker_folder(run: Path) -> Path:
    """Returns where this worker writes: the run's folder for the first, others' are within."""
    folder = run / "workers" / str(rank()) if rank() else run
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        del ctx
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        del ctx
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def summed(tensor: Tensor) -> Tensor:
    """Returns the sum of all workers' tensors; gradients flow to all of them."""
    return tensor if world_size() == 1 else _Sum.apply(tensor)


def gathered(rows: Tensor) -> Tensor:
    """Returns the rows (B, ...) of all workers, (W * B, ...), in the order of the workers.

    Gradients flow to all of them. Every worker must have as many rows.
    """
    if world_size() == 1:
        return rows
    place = torch.zeros(world_size(), *rows.shape, dtype=rows.dtype, device=rows.device)
    place[rank()] = rows
    return summed(place).flatten(0, 1)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every worker the mean of all workers' gradients."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def averaged(figures: dict[str, float]) -> dict[str, float]:
    """Returns the mean of every figure over the workers."""
    if world_size() == 1:
        return figures
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = torch.tensor(list(figures.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(figures, (values / world_size()).tolist(), strict=True))


def synchronise_norms(module: nn.Module) -> None:
    """Lets every BatchNorm within `module` take its statistics from all workers' batches.

    PyTorch's own SyncBatchNorm is for GPUs only.
    """
    if world_size() == 1:
        return
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.forward = _synchronised(norm)  # type: ignore[method-assign, assignment]


def _synchronised(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    alone = norm.forward

    def forward(given: Tensor) -> Tensor:
        if not norm.training:
            return alone(given)
        rows = given.float()
        axes = [axis for axis in range(rows.ndim) if axis != 1]
        count = rows.numel() // rows.shape[1] * world_size()
        shape = [1, -1, *[1] * (rows.ndim - 2)]
        mean = summed(rows.sum(axes)) / count
        centred = rows - mean.view(shape)
        variance = summed(centred.square().sum(axes)) / count
        if norm.momentum != 0:
            _follow(norm, mean.detach(), variance.detach() * count / (count - 1))
        normed = centred * (variance + norm.eps).rsqrt().view(shape)
        if norm.affine:
            normed = normed * norm.weight.view(shape) + norm.bias.view(shape)
        return normed.to(given.dtype)

    return forward


def _follow(norm: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    momentum = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance, momentum)


def launch(workers: int, stage: str, recipe: dict[str, Any], where: str, out_dir: Path) -> None:
    """Runs a stage on several workers of Ray Train, which starts them and watches over them.

    Args:
        workers: How many; one GPU each where there are GPUs.
        stage: Its name.
        recipe: The recipe's tables.
        where: What errors call the recipe.
        out_dir: The run's folder, which every worker must see.

    Raises:
        ConfigError: Ray Train is not installed, or there are more workers than GPUs.
        RuntimeError: A worker failed; what it said is in the error.
    """
    try:
        # Here, as one process needs neither Ray nor what Ray Train asks for.
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise ConfigError(
            'several workers need Ray Train: pip install "cutline[workers]"'
        ) from error
    gpus = torch.cuda.device_count()
    if 0 < gpus < workers:
        raise ConfigError(f"--workers {workers}, but there are {gpus} GPUs")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init()
    try:
        TorchTrainer(
            _work,
            train_loop_config={
                "stage": stage,
                "recipe": recipe,
                "where": where,
                "out": str(out_dir.resolve()),
                "folder": str(Path.cwd()),
            },
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0),
            run_config=RunConfig(storage_path=str(out_dir.resolve() / "workers")),
        ).fit()
    finally:
        ray.shutdown()


def _work(given: dict[str, Any]) -> None:
    os.chdir(given["folder"])  # a recipe's paths are relative to it
    if torch.cuda.is_available():
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    stage = variants.load("stages", given["stage"])
    config = validate(stage.Config, given["recipe"], given["where"])
    out_dir = Path(given["out"])
    with ExitStack() as stack:
        if rank():  # one progress bar is enough
            folder = worker_folder(out_dir)
            said = stack.enter_context((folder / "said.log").open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(said))
            stack.enter_context(redirect_stderr(said))
        stage.run(config, out_dir)
