"""Chat templates of a recipe: read from a file or a model, and the variables that they use."""

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer

_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""A tag that transformers adds to Jinja; it marks what an assistant wrote and declares nothing."""
_OURS = {
    "messages",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
    "dict",
    "loop",
    "cycler",
    "joiner",
    "lipsum",
}
"""Variables that every chat template is given."""


def read_chat_template(setting: str, name: str) -> Any:
    """The chat template in the file ``name``, or that of a model folder or hub id.

    Raises ValueError when there is none, or the file is no template.
    """
    path = Path(name)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
            _environment().parse(_GENERATION.sub("", text))
        except (OSError, UnicodeDecodeError, TemplateError) as error:
            raise ValueError(f"{setting}={name} is no readable Jinja template ({error})") from None
        return text
    if path.suffix in (".jinja", ".j2", ".txt"):
        raise ValueError(f"{setting}={name}: there is no such file (looked in {Path.cwd()})")
    template = read_template_tokenizer(setting, name).chat_template
    if not template:
        raise ValueError(
            f"{setting}={name}: its tokenizer has no chat template; name another model"
        )
    return template


def read_template_tokenizer(setting: str, name: str) -> Any:
    """The tokenizer of a model folder or hub id; ValueError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{setting}={name} cannot be read as a template file, a model folder or a hub id ({first})"
        ) from None


def template_variables(template: Any) -> frozenset[str] | None:
    """The variables that a chat template uses besides those that each is given; None: not known.

    ``template``: Jinja text, or the named texts of a tokenizer that has several.
    """
    texts = template.values() if isinstance(template, Mapping) else [template]
    found = [_variables(text) if isinstance(text, str) else None for text in texts]
    known = [each for each in found if each is not None]
    return frozenset().union(*known) if len(known) == len(found) else None


@lru_cache(maxsize=32)
def _variables(text: str) -> frozenset[str] | None:
    try:
        tree = _environment().parse(_GENERATION.sub("", text))
    except TemplateError:  # rendering it raises with the row
        return None
    return frozenset(meta.find_undeclared_variables(tree)) - _OURS


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])


def require_used(setting: str, options: Iterable[str], tokenizer: Any) -> None:
    """ValueError for the first of ``options`` that the tokenizer's chat template does not use."""
    used = template_variables(tokenizer.chat_template)
    for option in options if used is not None else ():
        assert used is not None
        if option in used or option in _OURS:
            continue
        near = difflib.get_close_matches(option, used, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{setting}.{option}: the chat template of {tokenizer.name_or_path!r} uses no variable of this "
            f"name; {meant}it uses {', '.join(sorted(used)) or 'none'}: correct the name, or leave it out"
        )
