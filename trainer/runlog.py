"""What a run tells: JSON lines, TensorBoard, and one line of progress on the terminal."""

import json
import math
import time
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class RunLog:
    """Scalars by step into `log.jsonl` and TensorBoard, and a progress bar.

    Args:
        folder: of the run.
        total: steps in all.
        start: the step a resumed run begins at; later lines of an earlier, killed run are dropped.
    """

    def __init__(self, folder: Path, *, total: int, start: int = 0) -> None:
        self._path = folder / "log.jsonl"
        self._drop_lines_after(start)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=5)
        self._images, self._since = 0, time.perf_counter()

    def _drop_lines_after(self, start: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break  # the line that a killed process was writing
        self._path.write_text("".join(kept), encoding="utf-8")

    def progress(self, images: int, loss: float) -> None:
        """Moves the bar by one step of `images` images."""
        self._images += images
        seconds = max(1e-9, time.perf_counter() - self._since)
        self._bar.set_postfix_str(f"{self._images / seconds:.0f} images/s, loss {loss:.3f}", False)
        self._bar.update()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records values under their names at `step`."""
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **known}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        self._bar.write(text)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()
