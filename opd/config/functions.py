"""Loads functions and classes of the user's own that a setting names."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

USER_ERRORS = (Exception, SystemExit)
"""What code of the user's own may raise, and is then one sentence; an interrupt stays an interrupt."""
MOST_CHARACTERS = 200


def load_function(setting: str, name: str) -> Any:
    """The function or class that ``path.py:name`` or ``module:name`` names.

    A path is relative to the working directory (a recipe's also to its folder, see ``opd.run.recipe``).
    ``setting`` is named in errors. ValueError when the file or module cannot be imported, or has
    nothing callable of that name. Importing executes the user's code.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise ValueError(
            f"{setting}={name}: expected path.py:name or module:name of a function or class"
        )
    try:
        module = _from_file(setting, source) if source.endswith(".py") else _from_module(source)
        found = getattr(module, attribute)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    except USER_ERRORS as error:
        raise ValueError(f"{setting}={name} cannot be imported: {describe_error(error)}") from error
    if not callable(found):
        raise ValueError(f"{setting}={name}: {attribute} is not a function or class")
    return found


def describe_error(error: BaseException) -> str:
    """The kind and the words of an error that a user's code raised, in one line."""
    try:
        words = " ".join(str(error).split())[:MOST_CHARACTERS]
    except Exception:  # its own __str__ may fail too
        words = ""
    return f"{type(error).__name__}: {words}".rstrip(": ")


def _from_module(name: str) -> Any:
    return importlib.import_module(name)


def _from_file(setting: str, source: str) -> Any:
    path = Path(source).resolve()
    if not path.is_file():
        raise FileNotFoundError(
            f"{setting}={source}: there is no file {path}; give an existing .py file"
        )
    module_name = f"opd_user_{path.stem}_{abs(hash(str(path))):x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
