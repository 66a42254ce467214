"""Whether the graders of a run can use the answers of its prompts."""

from opd.config.eval import GraderKind
from opd.config.reward import GraderRewardConfig
from opd.config.schema import Config
from opd.data.prompt_sets import PromptSets
from opd.evaluate.grade import grader


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
