"""Generated bad input: a fixed draw for the default suite, ten times as many other ones for ``-m slow``."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", tempfile.gettempdir() + "/opd_hypothesis")


def shares(examples: int) -> pytest.MarkDecorator:
    """Parametrises ``examples``: this many, and ten times as many in a slow test."""
    return pytest.mark.parametrize(
        "examples", [examples, pytest.param(10 * examples, marks=pytest.mark.slow)]
    )


def fuzz(check: Callable[..., None], *inputs: SearchStrategy[Any], examples: int) -> None:
    """Call ``check`` with ``examples`` generated inputs; a failing one is made small and shown."""
    checked = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 100,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )(given(*inputs)(check))
    checked()


def require_sentence(message: str) -> None:
    """AssertionError unless an error is what a person can read on a terminal."""
    assert 10 < len(message) < 4000, message
    assert "Traceback" not in message
    assert all(c.isprintable() or c == "\n" for c in message), ascii(message)
