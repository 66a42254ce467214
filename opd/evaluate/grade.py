"""Graders: pure functions that decide whether a completion gives the expected answer."""

import re
import threading
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from functools import partial

from opd.types import Answer

Grade = Callable[[str, Answer], bool]
"""(completion, answer) -> whether the completion is correct: it gives one of the alternatives."""

GRADERS = ("exact", "after", "contains", "number", "math")

# A sign counts only where it cannot be a minus between two operands ("5-3" ends in 3).
_NUMBER = re.compile(r"((?<![\w)])[-\u2212])?\$?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)(\.\d+)?|(\.\d+)")
_PARSE_SECONDS = 5


def grader(name: str, marker: str = "#") -> Grade:
    """The grader called ``name``; all of them ignore white space around both texts.

    Of an answer that is a tuple, every alternative is right.

    exact: the completion is the answer.
    after: what follows the last ``marker`` is the answer; without a marker it is wrong.
    contains: the answer occurs as whole words, ignoring case and punctuation; ``|`` in an answer that
        is one text separates alternatives.
    number: the completion's last number equals the answer's, ``1,000.0`` being ``1000``; an answer
        without a number is a ValueError.
    math: equal as mathematics, by math-verify (LaTeX, fractions, sets, intervals). It may be called
        in any thread; its time is limited in the main thread only.
    """
    match name:
        case "exact":
            return partial(_any, _exact)
        case "after":
            if not marker:
                raise ValueError('found an empty marker for the grader "after"; give one, e.g. "#"')
            return partial(_any, partial(_after, marker))
        case "contains":
            return _contains
        case "number":
            return _number
        case "math":
            return partial(_any, _math)
    raise ValueError(f"found grader {name!r}; allowed: {', '.join(GRADERS)}; choose one of them")


def shown_answer(answer: Answer) -> str:
    """The answer as one text, for people."""
    return answer if isinstance(answer, str) else " | ".join(answer)


def _alternatives(answer: Answer) -> tuple[str, ...]:
    return (answer,) if isinstance(answer, str) else answer


def _any(is_right: Callable[[str, str], bool], completion: str, answer: Answer) -> bool:
    return any(is_right(completion, one) for one in _alternatives(answer))


def _exact(completion: str, answer: str) -> bool:
    return completion.strip() == answer.strip()


def _after(marker: str, completion: str, answer: str) -> bool:
    _, found, tail = completion.rpartition(marker)
    return bool(found) and _exact(tail, answer)


def _normalise(text: str) -> str:
    """Case folded words between single spaces; "U.S." is "us" and "3.14" stays one word."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    joined = re.sub(r"(?<=\w)[.,'\u2019](?=\w)", "", folded)
    spaced = re.sub(r"[^\w\s]|_", " ", joined)
    return f" {' '.join(spaced.split())} "


def _contains(completion: str, answer: Answer) -> bool:
    words = _normalise(completion)
    alternatives = answer.split("|") if isinstance(answer, str) else answer
    return any(part in words for part in map(_normalise, alternatives) if part.strip())


def _last_number(text: str) -> Decimal | None:
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    sign, whole, fraction, bare = matches[-1].groups()
    digits = bare or f"{whole.replace(',', '')}{fraction or ''}"
    return -Decimal(digits) if sign else Decimal(digits)


def _number(completion: str, answer: Answer) -> bool:
    expected = [_last_number(one) for one in _alternatives(answer)]
    if all(number is None for number in expected):
        raise ValueError(
            f"found the answer {shown_answer(answer)[:60]!r} without a number; the grader number needs "
            "one: use exact, contains or math, or extract it with answer_regex"
        )
    found = _last_number(completion)
    return found is not None and found in expected


def _math(completion: str, answer: str) -> bool:
    from math_verify import parse, verify

    # math-verify limits its time by SIGALRM, which Python allows in the main thread only.
    is_main = threading.current_thread() is threading.main_thread()
    seconds = _PARSE_SECONDS if is_main else 0
    is_latex = "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer
    gold = parse(answer if is_latex else f"\\boxed{{{answer}}}", parsing_timeout=seconds)
    return verify(gold, parse(completion, parsing_timeout=seconds), timeout_seconds=seconds)
