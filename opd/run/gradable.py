"""Whether the graders of a run can use the answers of its prompts."""

from opd.config.eval import GraderKind
from opd.config.reward import GraderRewardConfig
from opd.config.schema import Config
from opd.data.prompt_sets import PromptSets
from opd.evaluate.grade import grader, shown_answer
from opd.types import Answer

INSPECTED, LONG = 64, 80
"""Answers that are inspected; characters from which on an answer is not a short one."""
WHOLE_TEXT = (GraderKind.exact, GraderKind.after, GraderKind.contains)
PERFECT = {GraderKind.after: "{marker}{answer}"}
"""A completion that gives nothing but the answer, where that is not the answer alone."""


def require_gradable(config: Config, prompts: PromptSets, *, grades_training: bool = False) -> None:
    """ValueError when the grader number would meet an answer without a number, or with several.

    ``grades_training``: eval.grader is applied to the training prompts too.
    """
    graded = [(config.eval.grader, prompts.eval)]
    if isinstance(config.reward, GraderRewardConfig):
        graded.append((config.reward.grader or config.eval.grader, prompts.train))
    if grades_training:
        graded.append((config.eval.grader, prompts.train))
    for kind, those in graded:
        for prompt in those if kind == GraderKind.number else []:
            assert prompt.answer is not None
            try:
                grader(kind.value)("", prompt.answer)
            except ValueError as error:
                raise ValueError(f"prompt {prompt.uid}: {error}") from None


def ungradable_answers(config: Config, prompts: PromptSets) -> list[str]:
    """A sentence for each set of prompts with answers that no completion can match, or hardly any."""
    sets = [("data.eval", config.eval.grader, config.eval.marker, prompts.eval)]
    if isinstance(config.reward, GraderRewardConfig):
        kind = config.reward.grader or config.eval.grader
        marker = config.reward.marker or config.eval.marker
        sets.append(("data.train", kind, marker, prompts.train))
    found = []
    for setting, kind, marker, those in sets:
        answers = [p.answer for p in those[:INSPECTED] if p.answer is not None]
        impossible = [a for a in answers if not _can_be_right(a, kind, marker)]
        whole = [a for a in answers if kind in WHOLE_TEXT and _is_long(a)]
        for cases, what in (
            (impossible, "even a completion that gives the answer itself is wrong"),
            (whole, "a completion must repeat the whole text"),
        ):
            if cases:
                found.append(
                    f"{len(cases)} of the first {len(answers)} answers of {setting}, such as "
                    f"{shown_answer(cases[0])[-60:]!r}, do not suit the grader {kind.value}: {what}; extract "
                    "the result with data.answer_regex, or choose another eval.grader"
                )
                break
    return found


def _can_be_right(answer: Answer, kind: GraderKind, marker: str) -> bool:
    grade = grader(kind.value, marker)
    alternatives = [answer] if isinstance(answer, str) else list(answer)
    text = PERFECT.get(kind, "{answer}")
    try:
        return any(grade(text.format(marker=marker, answer=one), answer) for one in alternatives)
    except ValueError:  # reported as an error elsewhere
        return True


def _is_long(answer: Answer) -> bool:
    alternatives = (answer,) if isinstance(answer, str) else answer
    return all(len(one) > LONG or "\n" in one.strip() for one in alternatives)
