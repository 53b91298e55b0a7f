"""What a run tells: JSON lines, TensorBoard, and one line of progress on the terminal."""

import json
import math
import time
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG = "log.jsonl"


def read_log(folder: Path) -> list[dict[str, float]]:
    """Returns the lines of a run's log, each with its `step`; nan for what was not finite."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that a killed process was writing
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


class RunLog:
    """Scalars by step into `log.jsonl` and TensorBoard, and a progress bar.

    Args:
        folder: of the run.
        total: steps in all.
        start: the step a resumed run begins at; later lines of an earlier, killed run are dropped,
            and all of them where nothing was saved (`start` is 0).
    """

    def __init__(self, folder: Path, *, total: int, start: int = 0) -> None:
        kept = [row for row in read_log(folder) if start and row["step"] <= start]
        partial = folder / f"{LOG}.partial"
        partial.write_text("".join(map(_line, kept)), encoding="utf-8")
        partial.replace(folder / LOG)
        self._file = (folder / LOG).open("a", encoding="utf-8")
        board = str(folder / "tensorboard")
        self._board = SummaryWriter(board, purge_step=start + 1 if start else 0)
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=5)
        self._images, self._since = 0, time.perf_counter()

    def progress(self, images: int, loss: float) -> None:
        """Moves the bar by one step of `images` images."""
        self._images += images
        seconds = max(1e-9, time.perf_counter() - self._since)
        self._bar.set_postfix_str(f"{self._images / seconds:.0f} images/s, loss {loss:.3f}", False)
        self._bar.update()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records values under their names at `step`."""
        self._file.write(_line({"step": step, **values}))
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


def _line(row: dict[str, float]) -> str:
    known = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(known, allow_nan=False) + "\n"
