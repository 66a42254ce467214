"""A progress bar on a terminal, nothing elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Yields ``advance(what is being done, share of it that is done)``."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _doing, _share: None
        return
    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(doing: str, share: float) -> None:
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing, total=1.0)
            bars.update(tasks[doing], completed=share)

        yield advance
