"""What a run writes down: CSV always, TensorBoard where it is installed; and its progress bar."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import written_whole


class RunLog:
    """Rows by name: "train" goes to train.csv in `folder`, and to TensorBoard as train/<column>.

    Args:
        folder: of the run; made if it is not there. None writes nothing (ranks other than the first).
        step: where the run goes on. Rows of later steps, which were written after the checkpoint, are removed, so that
            no step is there twice.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self.folder = folder
        self._board: Any = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.csv")):
            _drop_rows_after(path, step)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # the package tensorboard is optional
            return
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """One row: the step (how many are done) and the values, in columns that are the same in every row."""
        if self.folder is None:
            return
        path = self.folder / f"{name}.csv"
        new = not path.exists() or path.stat().st_size == 0
        with open(path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.8g}" for value in values.values())])
        if self._board is not None:
            for column, value in values.items():
                self._board.add_scalar(f"{name}/{column}", value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _drop_rows_after(path: Path, step: int) -> None:
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    kept = [row for i, row in enumerate(rows) if i == 0 or (row and row[0].isdigit() and int(row[0]) <= step)]
    if kept == rows:
        return
    with written_whole(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(kept)


class Progress:
    """A tqdm bar over the steps where tqdm is installed, else a line every `every` steps; silent if not `shown`."""

    def __init__(self, total: int, done: int, shown: bool, every: int) -> None:
        self.total, self.done, self.shown, self.every = total, done, shown, every
        self._bar: Any = None
        self._text = ""
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            seconds = 0.2 if sys.stderr.isatty() else 30.0  # in a log file every update is a line
            self._bar = tqdm(total=total, initial=done, unit="step", file=sys.stderr, mininterval=seconds)

    def advance(self) -> None:
        self.done += 1
        if self._bar is not None:
            self._bar.update()
        elif self.shown and self.done % self.every == 0:
            print(f"step {self.done}/{self.total} {self._text}", file=sys.stderr, flush=True)

    def note(self, **values: float) -> None:
        """Shown beside the bar from now on."""
        self._text = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._text, refresh=False)

    def say(self, line: str) -> None:
        """A line that does not disturb the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()
        elif self.shown:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
