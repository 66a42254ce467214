"""A reward beside the teacher: groups, spread, and rewards that are no numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opd.config.eval import EvalConfig
from opd.config.functions import load_function
from opd.config.reward import FunctionRewardConfig
from opd.evaluate.grade import grader
from opd.evaluate.reward import RewardFunction, RewardInput, grade_reward, reward_function
from opd.faults import RunError
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
    judge = RewardedTeacher(
        NO_TEACHER, lambda rs: [float(r.token_ids[0]) for r in rs], scale_rewards=True
    )
    scored = judge.score(written)
    assert [s.rollout for s in scored] == written
    assert [s.reward for s in scored] == [1.0, 2.0, 0.0, 2.0, 0.0]
    group = np.array([1.0, 0.0, 0.0])
    textbook = (group - group.mean()) / (group.std(ddof=1) + 1e-4)
    found = [s.advantage for s in scored]
    np.testing.assert_allclose([found[0], found[2], found[4]], textbook)
    assert (found[1], found[3]) == (0.0, 0.0)  # no spread, nothing to learn


def test_without_scale_the_advantage_is_the_distance_from_the_mean() -> None:
    assert advantage(1.0, [1.0, 0.0, 0.0, 0.0], scale_rewards=False) == 0.75


@pytest.mark.parametrize("group", [[1.0, 1.0, 1.0], [0.1] * 3, [-7.3] * 5, [1e-9] * 2, [0.4]])
@pytest.mark.parametrize("scale_rewards", [True, False])
def test_equal_rewards_have_advantages_of_exactly_zero(
    group: list[float], scale_rewards: bool
) -> None:
    assert [advantage(r, group, scale_rewards=scale_rewards) for r in group] == [0.0] * len(group)


@pytest.mark.parametrize(
    ("group", "most"),
    [
        ([1.0, 1.0, 1.000001], 0.0067),
        ([0.1 + 0.2, 0.3, 0.3], 1e-11),
        ([5.0, 5.0, 5.0, 5.0 + 1e-8], 1e-4),
        ([0.0, 1e-12], 1e-7),
    ],
)
def test_rewards_that_differ_by_rounding_have_advantages_near_zero(
    group: list[float], most: float
) -> None:
    found = [advantage(r, group, scale_rewards=True) for r in group]
    assert 0.0 < max(map(abs, found)) <= most


@pytest.mark.parametrize(
    "group", [[1.0, 0.0, 0.0, 0.0], [3.0, -2.0], [0.5, 0.25, 0.125], [1.0, 1.0, 1.000001]]
)
def test_scaled_advantages_divide_by_the_samples_deviation_and_a_constant(
    group: list[float],
) -> None:
    rewards = np.array(group)
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    found = [advantage(r, group, scale_rewards=True) for r in group]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_reward_that_is_no_number_is_refused_by_name() -> None:
    judge = RewardedTeacher(NO_TEACHER, lambda rs: [float("nan") for _ in rs], scale_rewards=True)
    with pytest.raises(RunError, match="prompt a is nan"):
        judge.score([rollout("a", 1)])


FUNCTIONS = """
import asyncio
import numpy as np
import torch
def none(c, a): return None
def text(c, a): return "1.0"
def nan(c, a): return np.float32("nan")
def infinite(c, a): return -float("inf")
def pair(c, a): return (1.0, {"x": 1})
def several(c, a): return torch.zeros(2)
def boom(c, a): raise KeyError("x")
def refuses(c, a): raise ValueError("not a proof")
def single(c, a): return np.float32(len(c))
def right(c, a): return c == a
def by_name(row, completion, prompt, answer=None):
    return [row["level"], completion, prompt, answer] == [2, "b", "2?", "b"]
def rest(completion, weight=0.5): return weight
async def later(completion, row):
    await asyncio.sleep(0.01 if completion == "a" else 0)
    return row["level"]
def batched(completions, rows): return [len(completions) + row["level"] for row in rows]
async def batched_later(rows): return np.array([row["level"] for row in rows])
def short(completions): return [1.0]
def word(completions): return "ab"
def scalar(completions): return 1.0
async def breaks(completion): raise KeyError("x")
def strange(completion, reference): return 1.0
def many(a, b, c): return 1.0
def tensor(c, a): return torch.tensor(0.5)
"""


def _function_reward(tmp_path: Path, name: str) -> RewardFunction:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    config = FunctionRewardConfig(function=f"{tmp_path / 'mine.py'}:{name}")
    return reward_function(config, EvalConfig())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "returned 'None' of type NoneType"),
        ("text", "returned '1.0' of type str"),
        ("nan", "returned 'nan' of type float32"),
        ("infinite", "returned '-inf' of type float"),
        ("pair", "of type tuple; expected a finite number"),
        ("several", "of type Tensor; expected a finite number"),
        ("boom", r"failed \(KeyError: 'x'\)"),
        ("refuses", r"failed \(ValueError: not a proof\)"),
    ],
)
def test_a_function_that_gives_no_reward_is_named_with_the_prompt(
    name: str, words: str, tmp_path: Path
) -> None:
    function = _function_reward(tmp_path, name)
    judge = RewardedTeacher(
        NO_TEACHER,
        lambda rs: function([RewardInput(text="abc", prompt=r.prompt) for r in rs]),
        scale_rewards=True,
    )
    with pytest.raises(RunError, match=rf"prompt a: reward\.function=.*mine\.py:{name} .*{words}"):
        judge.score([rollout("a", 1)])


@pytest.mark.parametrize(("name", "reward"), [("single", 3.0), ("right", 1.0), ("tensor", 0.5)])
def test_a_function_may_return_any_number(name: str, reward: float, tmp_path: Path) -> None:
    prompt = replace(rollout("a", 1).prompt, answer="abc")
    (found,) = _function_reward(tmp_path, name)([RewardInput(text="abc", prompt=prompt)])
    assert (found, type(found)) == (reward, float)


def _two() -> list[RewardInput]:
    return [
        RewardInput(
            text=text,
            prompt=replace(
                rollout(f"p{level}", 1).prompt, answer="b", text=f"{level}?", row={"level": level}
            ),
        )
        for level, text in ((1, "a"), (2, "b"))
    ]


@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        ("by_name", [0.0, 1.0]),
        ("rest", [0.5, 0.5]),
        ("later", [1.0, 2.0]),
        ("batched", [3.0, 4.0]),
        ("batched_later", [1.0, 2.0]),
    ],
)
def test_a_function_gets_what_its_parameters_name(
    name: str, rewards: list[float], tmp_path: Path
) -> None:
    assert _function_reward(tmp_path, name)(_two()) == rewards


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("short", r"returned 1 values for 2 completions; expected a list"),
        ("word", r"returned a str for 2 completions"),
        ("scalar", r"returned a float for 2 completions"),
        ("breaks", r"prompt p1: reward.function=.*:breaks failed \(KeyError: 'x'\)"),
    ],
)
def test_a_batched_or_async_function_that_gives_no_rewards_is_one_sentence(
    name: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        _function_reward(tmp_path, name)(_two())


@pytest.mark.parametrize("name", ["strange", "many"])
def test_parameters_that_nothing_is_known_for_are_refused_at_the_start(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="expected some of completion, answer, prompt, row"):
        _function_reward(tmp_path, name)


def test_a_grader_rewards_right_answers_and_no_answer_gets_nothing() -> None:
    reward = grade_reward(grader("after", "#"))
    assert (reward("1+2#3", "3"), reward("1+2#4", "3"), reward("3", None)) == (1.0, 0.0, 0.0)


def test_a_function_is_found_by_name_or_refused_by_name() -> None:
    assert callable(load_function("reward.function", "math:hypot"))
    for wrong in ("math", "math:nothing", "no_such_module:f", "math:pi"):
        with pytest.raises(ValueError, match=rf"reward\.function={wrong}"):
            load_function("reward.function", wrong)
