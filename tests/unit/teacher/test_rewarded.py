"""A reward beside the teacher: groups, spread, and rewards that are no numbers."""

import numpy as np
import pytest

from opd.config.functions import load_function
from opd.evaluate.grade import grader
from opd.evaluate.reward import grade_reward
from opd.teacher.no_teacher import NoTeacher
from opd.teacher.rewarded import RewardedTeacher, advantage
from opd.types import FinishReason, Prompt, Rollout

NO_TEACHER = NoTeacher(vocab_size=10, max_length=100)


def rollout(uid: str, token: int) -> Rollout:
    return Rollout(
        prompt=Prompt(uid=uid, token_ids=np.array([1], np.int32), answer="3"),
        token_ids=np.array([token], np.int32),
        logps=np.array([-1.0], np.float32),
        finish_reason=FinishReason.stop,
        version=0,
    )


def test_a_group_is_one_prompt_and_advantages_are_the_textbooks() -> None:
    written = [rollout("a", 1), rollout("b", 2), rollout("a", 0), rollout("b", 2), rollout("a", 0)]
    judge = RewardedTeacher(NO_TEACHER, lambda r: float(r.token_ids[0]), scale_rewards=True)
    scored = judge.score(written)
    assert [s.rollout for s in scored] == written
    assert [s.reward for s in scored] == [1.0, 2.0, 0.0, 2.0, 0.0]
    group = np.array([1.0, 0.0, 0.0])
    textbook = (group - group.mean()) / group.std(ddof=1)
    found = [s.advantage for s in scored]
    np.testing.assert_allclose([found[0], found[2], found[4]], textbook)
    assert (found[1], found[3]) == (0.0, 0.0)  # no spread, nothing to learn


def test_without_scale_the_advantage_is_the_distance_from_the_mean() -> None:
    assert advantage(1.0, [1.0, 0.0, 0.0, 0.0], scale_rewards=False) == 0.75


def test_a_reward_that_is_no_number_is_refused_by_name() -> None:
    judge = RewardedTeacher(NO_TEACHER, lambda r: float("nan"), scale_rewards=True)
    with pytest.raises(ValueError, match="prompt a is nan"):
        judge.score([rollout("a", 1)])


def test_a_grader_rewards_right_answers_and_no_answer_gets_nothing() -> None:
    reward = grade_reward(grader("after", "#"))
    assert (reward("1+2#3", "3"), reward("1+2#4", "3"), reward("3", None)) == (1.0, 0.0, 0.0)


def test_a_function_is_found_by_name_or_refused_by_name() -> None:
    assert callable(load_function("reward.function", "math:hypot"))
    for wrong in ("math", "math:nothing", "no_such_module:f", "math:pi"):
        with pytest.raises(ValueError, match=rf"reward\.function={wrong}"):
            load_function("reward.function", wrong)
