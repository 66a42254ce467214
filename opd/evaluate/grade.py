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

_MINUS = r"\-\u2212\u2013"  # as a minus sign, people and models write an en dash too
# A sign counts only where it cannot be a minus between two operands ("5-3" ends in 3).
_SIGN = rf"(?<![\w)\]])[{_MINUS}]"
_COMMA = r"(?:,|\{,\}|\\,)"
_NUMBER = re.compile(
    rf"({_SIGN})?\$?(?:(\d{{1,3}}(?:{_COMMA}\d{{3}})+(?!\d)|\d+)(\.\d+)?|(\.\d+))"
    rf"(e[+{_MINUS}]?\d{{1,4}}(?!\w))?",
    re.ASCII | re.IGNORECASE,
)

# Scripts that write no spaces between words; each of their characters counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_SYMBOLS = "<>=+/^~*\u2264\u2265\u2260\u2248\u00b1\u00d7\u00f7"
"""Characters that ``contains`` compares when the answer has them; others are punctuation."""
_LETTER = r"[^\W\d_]"
_CHARACTER = rf"[^\W_{_UNSPACED}]"
_TOKEN = re.compile(
    rf"(?P<minus>{_SIGN}\$?(?=\.?\d))?(?P<word>[{_UNSPACED}]|(?:(?<![\w.])\.(?=\d))?{_CHARACTER}+"
    rf"(?:(?<=\d)[.,](?=\d){_CHARACTER}+)*(?:(?<={_LETTER})(?:\+\+|\#(?!\w)))?)"
    rf"|(?P<symbol>[{re.escape(_SYMBOLS)}])"
)
_THOUSANDS = re.compile(r"(?<!\d)(?<!\d[.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_INSIDE_WORD = re.compile(rf"(?<={_LETTER})['.\u2019](?={_LETTER})|(?<=\d)['\u2019](?={_LETTER})")
_PLUS = re.compile(r"(?<![\w)\]+])\+(?=\.?\d)")
_COMMENT = re.compile(r"(?<!\\)%")
_PARSE_SECONDS = 5


def grader(name: str, marker: str = "#") -> Grade:
    """The grader called ``name``; all of them ignore white space around both texts.

    Of an answer that is a tuple, every alternative is right.

    exact: the completion is the answer.
    after: what follows the last ``marker`` is the answer; without a marker it is wrong.
    contains: the answer occurs as whole words and numbers (in Chinese, Japanese and Thai, as their
        characters), ignoring case and punctuation; ``3.14`` is one number, ``-5`` is not ``5``, and
        operators that the answer has must be there. An answer of symbols alone is compared
        literally. ``|`` in an answer that is one text separates alternatives.
    number: the completion's last number equals the answer's, ``1,000.0`` being ``1000`` and ``1.5e3``
        ``1500``; an answer without a number, or with several, is a ValueError.
    math: the same text, or equal as mathematics, by math-verify (LaTeX, fractions, sets, intervals,
        ``%`` as a percent sign). It may be called in any thread; its time is limited in the main
        thread only.
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


def _contains(completion: str, answer: Answer) -> bool:
    parts = answer.split("|") if isinstance(answer, str) else list(answer)
    # an answer of nothing but "|" separates nothing
    alternatives = [part for part in parts if part.strip()] or list(_alternatives(answer))
    folded = _folded(completion)
    return any(_is_within(_folded(one), folded) for one in alternatives)


def _folded(text: str) -> str:
    """Case folded, with single spaces; "U.S." is "us", "1,000" is "1000" and "3.14" stays."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    joined = _INSIDE_WORD.sub("", folded)
    return _PLUS.sub("", _THOUSANDS.sub(lambda found: found[0].replace(",", ""), joined))


def _is_within(answer: str, completion: str) -> bool:
    """Whether the tokens of ``answer`` follow each other in ``completion``; without any, its characters."""
    wanted = [found.lastgroup == "word" for found in _TOKEN.finditer(answer)]
    if not any(wanted):
        return bool(answer) and answer in completion
    symbols = set(answer) & set(_SYMBOLS)
    return _tokens(answer, symbols) in _tokens(completion, symbols)


def _tokens(text: str, symbols: set[str]) -> str:
    """The words, numbers with their sign, and ``symbols`` of a text, each between two spaces."""
    tokens: list[str] = []
    for found in _TOKEN.finditer(text):
        if found["word"] is not None:
            tokens.append(f"{'-' if found['minus'] else ''}{found['word']}")
        elif found["symbol"] in symbols:
            tokens.append(found["symbol"])
    return f" {' '.join(tokens)} "


def _numbers(text: str) -> list[Decimal]:
    found: list[Decimal] = []
    for sign, whole, fraction, bare, exponent in _NUMBER.findall(text):
        digits = bare or f"{re.sub(r'[^0-9]', '', whole)}{fraction}"
        power = re.sub(f"[{_MINUS}]", "-", exponent)
        found.append(Decimal(f"{'-' if sign else ''}{digits}{power}"))
    return found


def _number(completion: str, answer: Answer) -> bool:
    expected = {number for one in _alternatives(answer) if (number := _the_number(one)) is not None}
    if not expected:
        raise ValueError(
            f"found the answer {shown_answer(answer)[:60]!r} without a number; the grader number needs "
            "one: use exact, contains or math, or extract it with answer_regex"
        )
    found = _numbers(completion)
    return bool(found) and found[-1] in expected


def _the_number(answer: str) -> Decimal | None:
    """The one number of an answer, or None; ValueError when it has several."""
    numbers = _numbers(answer)
    if len(set(numbers)) > 1:
        raise ValueError(
            f"found the answer {answer[-60:]!r} with {len(numbers)} numbers; the grader number compares "
            "one: use math (for fractions) or exact, or extract one with answer_regex"
        )
    return numbers[0] if numbers else None


def _math(completion: str, answer: str) -> bool:
    from math_verify import parse, verify

    if _exact(completion, answer):
        return True
    if "%" in answer:  # in LaTeX an unescaped % starts a comment
        answer, completion = (_COMMENT.sub(r"\\%", text) for text in (answer, completion))
    # math-verify limits its time by SIGALRM, which Python allows in the main thread only.
    is_main = threading.current_thread() is threading.main_thread()
    seconds = _PARSE_SECONDS if is_main else 0
    is_latex = "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer
    # math-verify finds the number of $50\%$, and not that of \boxed{50\%}
    in_latex = f"${answer}$" if "%" in answer else f"\\boxed{{{answer}}}"
    gold = parse(answer if is_latex else in_latex, parsing_timeout=seconds)
    return verify(gold, parse(completion, parsing_timeout=seconds), timeout_seconds=seconds)
