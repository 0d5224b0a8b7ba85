"""The progress line: steps, images a second, time left, loss."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlx.core.plain import plain


class ConsoleProgress:
    """A rich progress bar on a terminal; one line at each tenth of the run elsewhere."""

    def __init__(self, console: Console, title: str, start: int, total: int) -> None:
        self.console, self.title, self.total = console, title, total
        self._next_line = start
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[info]}", markup=False),
                TimeRemainingColumn(),
                console=console,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                plain(title), total=total, completed=start, info=""
            )

    def update(self, step: int, loss: float, images_per_s: float, wait: float) -> None:
        info = f"loss {loss:.4f}  {images_per_s:,.0f} images/s"
        if wait > 0.1:
            info += f"  waiting for data {wait:.0%}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, info=info)
        elif step >= self._next_line or step == self.total:
            self.console.print(f"{self.title} {step}/{self.total}  {info}", highlight=False)
            self._next_line = step + max(1, self.total // 10)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
