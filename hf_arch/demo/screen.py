"""What the demo shows while it works: a line for each thing that is done, a bar for what is under way."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging


class Screen:
    """While it is open, transformers is quiet: no bars and no warnings of its own."""

    def __init__(self):
        columns = TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn()
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())
        self.console = self.progress.console
        self.warnings = warnings.catch_warnings(action="ignore", category=FutureWarning)

    def __enter__(self) -> "Screen":
        self.verbosity, self.bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.warnings.__enter__()
        self.progress.start()
        return self

    def __exit__(self, *error) -> None:
        self.progress.stop()
        self.warnings.__exit__(*error)
        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def bar(self, title: str, total: int) -> Callable[[], None]:
        """A new bar; each call of what is answered moves it by one."""
        task = self.progress.add_task(title, total=total)
        return lambda: self.progress.advance(task)

    @contextmanager
    def waiting(self, title: str) -> Iterator[None]:
        """A bar for something of unknown length."""
        task = self.progress.add_task(title, total=None)
        yield
        self.progress.update(task, total=1, completed=1)
