"""A progress bar on a terminal, nothing elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Yields ``advance(name of the work, share that is done)``; one bar for each name."""
    console = Console(stderr=True, markup=False)
    if not console.is_terminal:
        yield lambda _name, _share: None
        return
    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=1.0)
            bars.update(tasks[name], completed=share)

        yield advance
