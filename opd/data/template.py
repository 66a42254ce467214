"""Templates over the columns of a row: data.template and data.teacher_template."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from opd.data.chat import read_messages
from opd.data.columns import (
    Scalar,
    column_names,
    find_column,
    is_missing,
    plain_text,
    sequence,
    unboxed,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTemplate:
    """Text with columns of the row in it: {name}, {struct.name}, and {prompt} for ``prompt_field``."""

    setting: str
    text: str
    prompt_field: str

    @property
    def takes_prompt(self) -> bool:
        """Whether the prompt itself is in the text."""
        return takes_prompt(self.text, self.prompt_field)

    def fill(self, place: str, row: Mapping[str, Any], prompt: Any) -> str:
        """The text for ``row``, whose prompt is ``prompt`` (None: it has no such column).

        ValueError naming ``place`` when a column is absent, null, nan, infinite, or not text.
        """
        own = {} if prompt is None else {"prompt": prompt, self.prompt_field: prompt}
        try:
            return _Columns(place, self.setting).vformat(self.text, (), {**row, **own})
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"{place}: the template needs the field {error}; found the fields "
                f"{column_names(row)}; double literal braces: {{{{ }}}}"
            ) from error
        except _NotText as error:
            raise ValueError(str(error)) from None
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{self.setting}={self.text!r} cannot be filled ({error}); write fields as {{name}} "
                "and double literal braces: {{ }}"
            ) from error


def takes_prompt(text: str, prompt_field: str) -> bool:
    """Whether the template ``text`` has the prompt in it, as {prompt} or by the name of its column."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text)]
    except ValueError:
        return True  # the error is raised, with the place, where the template is filled
    return bool({"prompt", prompt_field} & set(names))


class _NotText(Exception):
    """A column that has no one text."""


class _Columns(string.Formatter):
    """Fills in columns by dotted path, each as text."""

    def __init__(self, place: str, setting: str) -> None:
        super().__init__()
        self._place, self._setting = place, setting

    def get_field(
        self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, str]:
        """The value of a column; ``name[key]`` as ``str.format`` reads it."""
        if "[" in field_name:
            value, _ = super().get_field(field_name, args, kwargs)
        else:
            value = find_column(kwargs, field_name)
        return self._scalar(field_name, value), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        """A number without a format as people write it."""
        return format(value, format_spec) if format_spec else plain_text(value)

    def _scalar(self, name: str, value: Any) -> Any:
        """The one text or number of a value: a list of one, or one message, is what is in it."""
        items = sequence(value)
        one = unboxed(items[0] if items is not None and len(items) == 1 else value)
        if isinstance(one, Mapping) and "role" in one:
            one = read_messages(self._place, [one])[0]["content"]
        if isinstance(one, get_args(Scalar)) and not is_missing(one):
            return one
        match one:
            case _ if is_missing(one):
                found, remedy = "null" if one is None else str(one), "write a value"
            case Mapping():
                found = f"a struct ({column_names(one)})"
                remedy = f"name a field inside it, {{{name}.field}}"
            case _ if items is not None:
                found = f"a list of {len(items)}"
                remedy = "join it to one text with data.function"
            case _:
                found, remedy = f"a {type(one).__name__}", "turn it into text with data.function"
        raise _NotText(
            f"{self._place}: found {found} in field {name!r}, where {self._setting} takes a text or a "
            f"number; {remedy}, or leave the field or the row out"
        )
