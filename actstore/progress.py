"""Progress with rate and ETA: a live rich bar on a terminal, one plain line every few seconds elsewhere.

Plain lines exist because long captures run under schedulers whose logs a live bar would ruin.
"""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

PLAIN_INTERVAL_S = 5.0
"""Seconds between plain lines where there is no terminal."""


def scaled(value: float) -> str:
    """Three significant digits with k, M, G, T: `scaled(12345) == '12.3k'`."""
    for suffix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or suffix == "T":
            return f"{value:.3g}{suffix}" if suffix or value != int(value) else f"{int(value)}"
        value /= 1000
    raise AssertionError


def clock(seconds: float) -> str:
    """`m:ss` or `h:mm:ss`."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


class Step:
    """One long step: `advance` as work is done, `note` for what else is worth seeing."""

    def __init__(self, progress: "Progress", name: str, total: float, unit: str) -> None:
        """Start counting; made by `Progress.step`."""
        self.name, self.total, self.unit = name, total, unit
        self.done = 0.0
        self.text = ""
        self._progress = progress
        self._began = self._printed = time.monotonic()
        self._skipped = 0.0
        self._task: TaskID | None = None
        if progress.live:
            self._task = progress.live.add_task(name, total=total, rate="", note="")

    def skip(self, n: float) -> None:
        """Count work that was done before this run, without letting it inflate the rate."""
        self._skipped += n
        self.advance(n)

    def restart(self) -> None:
        """Begin to count time now: what came before was getting ready."""
        self._began = time.monotonic()

    def expect(self, total: float) -> None:
        """Set the number of units, where it is known only after the step began."""
        self.total = total
        if self._progress.live and self._task is not None:
            self._progress.live.update(self._task, total=total)

    def advance(self, n: float) -> None:
        """Count n more units as done."""
        self.done += n
        self._show()

    def note(self, text: str) -> None:
        """Replace the text beside the rate, for example the newest loss."""
        self.text = text

    @property
    def rate(self) -> float:
        """Units per second in this run."""
        return (self.done - self._skipped) / max(time.monotonic() - self._began, 1e-9)

    def _show(self) -> None:
        live, now = self._progress.live, time.monotonic()
        if live and self._task is not None:
            live.update(self._task, completed=self.done, rate=f"{scaled(self.rate)} {self.unit}/s", note=self.text)
        elif now - self._printed >= PLAIN_INTERVAL_S or self.done >= self.total:
            self._printed = now
            left = (self.total - self.done) / self.rate if self.rate > 0 else 0.0
            share = 100 * self.done / self.total if self.total else 100.0
            line = f"{self.name}: {share:.0f}% ({scaled(self.done)} of {scaled(self.total)} {self.unit}), "
            line += f"{scaled(self.rate)} {self.unit}/s, {clock(left)} left"
            self._progress.console.print(f"{line}  {self.text}".rstrip(), highlight=False, soft_wrap=True)


def _whole() -> Column:
    """A column that a narrow terminal does not cut; the note at the end gives way first."""
    return Column(no_wrap=True, overflow="fold")


class Progress:
    """The display of one command; use as a context manager and open a `step` per long step."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on `console`, by default standard error."""
        self.console = console or Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)
        self.live: RichProgress | None = None

    def step(self, name: str, *, total: float, unit: str) -> Step:
        """Begin a step of `total` units."""
        return Step(self, name, total, unit)

    def say(self, line: str) -> None:
        """Print a line, above the bars if there are any."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        """Show the live bars, if there is a terminal."""
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:<10}", table_column=_whole()),
                BarColumn(bar_width=16),
                TextColumn("{task.percentage:>3.0f}%", table_column=_whole()),
                TextColumn("{task.fields[rate]:>16}", table_column=_whole()),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
                TextColumn("left", table_column=_whole()),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            )
            self.live = RichProgress(*columns, console=self.console, expand=True)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the finished bars on the screen."""
        if self.live:
            self.live.stop()
            self.live = None
