"""A reward beside the teacher: groups, spread, and rewards that are no numbers."""

from pathlib import Path

import numpy as np
import pytest

from opd.config.eval import EvalConfig
from opd.config.functions import load_function
from opd.config.reward import FunctionRewardConfig
from opd.evaluate.grade import grader
from opd.evaluate.reward import Completed, RewardFunction, grade_reward, reward_function
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
        lambda rs: function([Completed(completion="abc", uid=r.prompt.uid) for r in rs]),
        scale_rewards=True,
    )
    with pytest.raises(RunError, match=rf"prompt a: reward\.function=.*mine\.py:{name} .*{words}"):
        judge.score([rollout("a", 1)])


@pytest.mark.parametrize(("name", "reward"), [("single", 3.0), ("right", 1.0), ("tensor", 0.5)])
def test_a_function_may_return_any_number(name: str, reward: float, tmp_path: Path) -> None:
    (found,) = _function_reward(tmp_path, name)([Completed(completion="abc", answer="abc")])
    assert (found, type(found)) == (reward, float)


def test_a_grader_rewards_right_answers_and_no_answer_gets_nothing() -> None:
    reward = grade_reward(grader("after", "#"))
    pairs = [("1+2#3", "3"), ("1+2#4", "3"), ("3", None)]
    assert reward([Completed(completion=c, answer=a) for c, a in pairs]) == [1.0, 0.0, 0.0]


NAMED = """
import asyncio
def by_name(row, completion): return len(completion) + row["weight"]
def with_others(completion, **others): return sorted(others) == ["answer", "prompt", "row"]
def of_all(completions, rows, scale=2):
    return [scale * len(c) + r["weight"] for c, r in zip(completions, rows)]
def of_all_with_others(prompts, completions, **others): return [p == "ask" for p in prompts]
def too_few(completions): return [1.0]
def too_few_fails(completions): raise KeyError("x")
def unknown(completion, reference, other): return 1.0
together = []
async def each(completion, answer):
    together.append(completion)
    while len(together) < 2: await asyncio.sleep(0)
    return float(completion == answer)
async def breaks(completion): raise OSError("no judge")
async def of_all_async(completions, answers):
    await asyncio.sleep(0)
    return [float(c == a) for c, a in zip(completions, answers)]
"""
TWO = [
    Completed(completion="abc", answer="abc", prompt="ask", row={"weight": 10}, uid="p"),
    Completed(completion="ab", answer="abc", prompt="ask", row={"weight": 20}, uid="q"),
]


def _named(tmp_path: Path, name: str) -> RewardFunction:
    (tmp_path / "named.py").write_text(NAMED)
    config = FunctionRewardConfig(function=f"{tmp_path / 'named.py'}:{name}")
    return reward_function(config, EvalConfig())


@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        ("by_name", [13.0, 22.0]),
        ("with_others", [1.0, 1.0]),
        ("of_all", [16.0, 24.0]),
        ("of_all_with_others", [1.0, 1.0]),
        ("each", [1.0, 0.0]),
        ("of_all_async", [1.0, 0.0]),
    ],
)
def test_a_function_gets_what_its_parameters_name(
    name: str, rewards: list[float], tmp_path: Path
) -> None:
    assert _named(tmp_path, name)(TWO) == rewards


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too_few", "returned 1 values for 2 completions"),
        ("too_few_fails", r"failed \(KeyError: 'x'\)"),
        (
            "unknown",
            r"parameters \(completion, reference, other\): allowed are some of completion, answer",
        ),
        ("breaks", r"prompt p: .*failed \(OSError: no judge\)"),
    ],
)
def test_a_function_that_cannot_be_called_so_is_one_sentence(
    name: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        _named(tmp_path, name)(TWO)


def test_a_function_is_found_by_name_or_refused_by_name() -> None:
    assert callable(load_function("reward.function", "math:hypot"))
    for wrong in ("math", "math:nothing", "no_such_module:f", "math:pi"):
        with pytest.raises(ValueError, match=rf"reward\.function={wrong}"):
            load_function("reward.function", wrong)
