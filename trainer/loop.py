"""The one training loop: it knows an Objective, batches, and how to go on after a crash."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.utils.data import DataLoader

from trainer.checkpoint import (
    CHECKPOINT,
    below,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from trainer.config import Config
from trainer.dataset import EpochSampler, TrainingData
from trainer.distributed import (
    average_gradients,
    averaged,
    rank,
    synchronise_norms,
    worker_folder,
    world_size,
)
from trainer.errors import CheckpointError, ConfigError, DivergenceError
from trainer.lora import merged
from trainer.objective import Objective
from trainer.optim import MovingAverage, Optim, build_optimizer, learning_rate
from trainer.runlog import RunLog


class Loop(Config):
    """Keys of `[loop]`."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(default=32, ge=1)
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are averaged into one step."""
    autocast: Literal["off", "bf16", "fp16"] = "off"
    """What matrix products are computed in; bf16 is off on a CPU without instructions for it."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the weights' moving average, which is what is evaluated and kept; 0 is off."""
    workers: int = Field(default=1, ge=0)
    """Processes that prepare batches; 0 prepares them in the loop."""
    save_every: int = Field(default=500, ge=1)
    """Steps between checkpoints, besides one after each epoch."""
    evaluate_every: int = Field(default=1, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""
    device: str = "auto"


class TrainingLoop:
    """Runs an objective over a data set.

    All randomness of a step comes from the seed and its number, and all of an item from the seed,
    the epoch and its index: a run that was killed goes on from its last checkpoint with the losses
    it would have had, bit for bit on a CPU.

    Args:
        objective: the loss and its modules; moved to the device.
        dataset: its items are asked for by (epoch, index).
        config: `[loop]`; `optim`: `[optim]`.
        seed: of order and dropout.
        folder: of the run: `last.safetensors`, `log.jsonl`, `tensorboard/`.
        evaluate: called after an epoch with the kept weights in place; what it returns is logged.
        evaluate_first: also call it, with epoch -1, before the first step, as step 0 of the log.
        after_evaluation: called when that is in the log, the kept weights still in place.
        after_saving: called when the state that was evaluated is in the checkpoint; with it, the
            state before the first step is saved too, where that is evaluated.
        until: epochs to stop after; the schedule stays that of all of them.
    """

    def __init__(
        self,
        objective: Objective,
        dataset: TrainingData,
        *,
        config: Loop,
        optim: Optim,
        seed: int,
        folder: Path,
        evaluate: Callable[[int], dict[str, float]] | None = None,
        evaluate_first: bool = False,
        after_evaluation: Callable[[], None] | None = None,
        until: int | None = None,
        after_saving: Callable[[], None] | None = None,
    ) -> None:
        self._config, self._optim, self._seed, self._folder = config, optim, seed, folder
        self.device = device_of(config)
        self._objective = objective.to(self.device)
        # Convolutions on a CPU run half as long in this layout.
        self._objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        synchronise_norms(self._objective)
        self._dataset, self._evaluate = dataset, evaluate
        self._evaluate_first, self._after_evaluation = evaluate_first, after_evaluation
        self._after_saving = after_saving
        self._optimizer = build_optimizer(objective, optim)
        self._average = MovingAverage(objective, config.ema) if config.ema else None
        self._half = _half(config, self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.autocast == "fp16")
        batches = len(EpochSampler(len(dataset), config.batch_size, seed=seed, epoch=0))
        if config.accumulate > batches:
            raise ConfigError(
                f"loop.accumulate = {config.accumulate}, but an epoch has {batches} batches"
            )
        if min(config.batch_size, len(dataset)) % world_size():
            raise ConfigError(
                f"batches of {min(config.batch_size, len(dataset))} images cannot be shared evenly "
                f"by {world_size()} workers; change loop.batch_size"
            )
        self._epoch_steps = batches // config.accumulate
        self.total = config.epochs * self._epoch_steps
        self._until = config.epochs if until is None else until
        self.last = self._until * self._epoch_steps
        self.step = 0

    @property
    def checkpoint(self) -> Path:
        """The file that the run goes on from."""
        return self._folder / CHECKPOINT

    def run(self) -> None:
        """Trains to the end, resuming where a checkpoint is."""
        if self.checkpoint.exists():
            self._load()
        with RunLog(worker_folder(self._folder), total=self.last, start=self.step) as log:
            if self._evaluate_first and self.step == 0:
                self._report(-1, log)
                if self._after_saving:
                    self._save()
                    self._after_saving()
            for epoch in range(self.step // self._epoch_steps, self._until):
                self._objective.before_epoch(epoch)
                self._epoch(epoch, log)
                self._finish_epoch(epoch, log)

    def _epoch(self, epoch: int, log: RunLog) -> None:
        self._objective.train()
        taken = self.step - epoch * self._epoch_steps
        batches = iter(self._loader(epoch, start=taken * self._config.accumulate))
        for _ in range(taken, self._epoch_steps):
            losses = self._train_step([next(batches) for _ in range(self._config.accumulate)])
            rate = learning_rate(self.step - 1, self.total, self._optim)
            log.progress(self._config.batch_size * self._config.accumulate, losses["loss"])
            log.scalars(self.step, {**losses, "lr": rate})
            if self.step % self._config.save_every == 0 and self.step % self._epoch_steps:
                self._save()

    def _finish_epoch(self, epoch: int, log: RunLog) -> None:
        last = epoch + 1 == self._until
        evaluates = last or (epoch + 1) % self._config.evaluate_every == 0
        if evaluates:
            self._report(epoch, log)
        self._save()
        if evaluates and self._after_saving:
            self._after_saving()

    def _report(self, epoch: int, log: RunLog) -> None:
        if self._evaluate is None or rank():
            return
        with self._kept_weights():
            self._objective.eval()
            figures = self._evaluate(epoch)
            log.scalars(self.step, figures)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            when = f"epoch {epoch + 1}/{self._config.epochs}" if epoch >= 0 else "before"
            log.say(f"{when}: {shown}")
            if self._after_evaluation:
                self._after_evaluation()

    def _train_step(self, batches: list[dict[str, Any]]) -> dict[str, float]:
        torch.manual_seed((self._seed << 32) + (rank() << 24) + self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total, self._optim) * group["scale"]
        sums: dict[str, float] = {}
        for batch in batches:
            moved = {key: value.to(self.device) for key, value in batch.items()}
            if moved["images"].ndim == 4:
                moved["images"] = moved["images"].contiguous(memory_format=torch.channels_last)
            with self._autocast():
                losses = self._objective(moved)
            if not torch.isfinite(losses["loss"]):
                raise DivergenceError(self._explain_divergence())
            self._scaler.scale(losses["loss"] / len(batches)).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() / len(batches)
        average_gradients(self._objective.parameters())
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._objective.parameters(), self._config.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self._average:
            self._average.update(self.step)
        self._objective.after_step(self.step)
        return {**averaged(sums), "gradient_norm": float(norm)}

    def _explain_divergence(self) -> str:
        kept = f"; {self.checkpoint} holds a good state" if self.checkpoint.exists() else ""
        return (
            f"the loss of step {self.step + 1} is not a number; lower optim.lr (now "
            f"{self._optim.lr}) or loop.clip, or set loop.autocast to off{kept}"
        )

    def _loader(self, epoch: int, start: int) -> DataLoader[dict[str, Any]]:
        config = self._config
        return DataLoader(
            self._dataset,
            batch_sampler=EpochSampler(
                len(self._dataset),
                config.batch_size,
                seed=self._seed,
                epoch=epoch,
                start=start,
                part=(rank(), world_size()),
            ),
            collate_fn=self._dataset.collate,
            num_workers=config.workers,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self._half) if self._half else nullcontext()

    def _kept_weights(self) -> AbstractContextManager[Any]:
        """Puts the moving average in place of the weights for a while."""
        return _Swapped(self._average) if self._average else nullcontext()

    def _save(self) -> None:
        if rank():
            return
        tensors = {f"objective.{k}": v for k, v in self._objective.state_dict().items()}
        packed = pack_optimizer(self._optimizer)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in packed.items()}
        if self._average:
            tensors |= {f"average.{name}": v for name, v in self._average.shadow.items()}
        # Tied weights (a decoder's embedding and head) are one storage, which safetensors refuses.
        distinct = {name: tensor.clone() for name, tensor in tensors.items()}
        state = {"step": self.step, "total": self.total, "scaler": self._scaler.state_dict()}
        save_checkpoint(self.checkpoint, distinct, state)

    def _load(self) -> None:
        tensors, state = load_checkpoint(self.checkpoint)
        if state["total"] != self.total:
            raise CheckpointError(
                f"{self.checkpoint}: belongs to a run of {state['total']} steps, this recipe makes "
                f"{self.total}; remove the folder or choose another with --out"
            )
        self._objective.load_state_dict(below(tensors, "objective."))
        unpack_optimizer(self._optimizer, below(tensors, "optimizer."))
        if self._average:
            self._average.load(below(tensors, "average."))
        self._scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


def device_of(config: Loop) -> torch.device:
    """Returns the device that `[loop]` asks for."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _half(config: Loop, device: torch.device) -> torch.dtype | None:
    """Returns the type of two bytes that `[loop]` asks for, if computing in it saves time."""
    if config.autocast == "bf16" and device.type == "cpu" and not has_bf16():
        if rank() == 0:
            print("loop.autocast = bf16 would be slower on this processor: training in float32")
        return None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.autocast]


def has_bf16() -> bool:
    """Returns whether the CPU has instructions for bfloat16, which is very slow without."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def load_kept_weights(module: nn.Module, path: Path, prefix: str) -> None:
    """Loads what a checkpoint keeps below `prefix`: the moving average where there is one.

    Updates of low rank (see `trainer.lora`) are added to their weights.

    Raises:
        CheckpointError: the file is missing or damaged, or does not fit the module.
    """
    tensors, _ = load_checkpoint(path)
    trained, average = (below(tensors, f"{part}.{prefix}") for part in ("objective", "average"))
    try:
        module.load_state_dict(merged(trained))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise CheckpointError(f"{path}: of another architecture: {first}") from None
    # After all the rest: the average has a tied weight (embedding and head) under one name only.
    module.load_state_dict(merged(average, trained), strict=False)


class _Swapped:
    def __init__(self, average: MovingAverage) -> None:
        self._average = average

    def __enter__(self) -> None:
        self._average.swap()

    def __exit__(self, *_: object) -> None:
        self._average.swap()
