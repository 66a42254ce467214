"""Functions of the user's own that fail in any way are one sentence with the function and the row."""

from pathlib import Path

import numpy as np
import pytest

from opd.config.data import DataConfig
from opd.config.eval import EvalConfig
from opd.config.functions import load_function
from opd.config.reward import FunctionRewardConfig
from opd.data.source_rows import source_rows
from opd.evaluate.reward import RewardInput, reward_function
from opd.faults import RunError
from opd.teacher.no_teacher import NoTeacher
from opd.teacher.rewarded import RewardedTeacher
from opd.types import FinishReason, Prompt, Rollout

BODIES = {
    "raises": "raise RuntimeError('bad\\nnews')",
    "key": "return {}['x']",
    "exits": "import sys; sys.exit(3)",
    "exits silently": "raise SystemExit",
    "recurses": "return reward(completion, answer)",
    "None": "return None",
    "text": "return '1.0'",
    "bytes": "return b'1'",
    "list": "return [1.0]",
    "dict": "return {}",
    "nan": "return float('nan')",
    "infinite": "return -float('inf')",
    "huge": "return 10**400",
    "complex": "return 1j",
    "generator": "yield 1.0",
    "object": "return type('T', (), {'__str__': lambda s: 1/0, '__float__': lambda s: exit()})()",
    "own error": "raise type('E', (Exception,), {'__str__': lambda s: 1/0})()",
}
HEADS = {
    "of other names": "def reward(a): return 1.0",
    "async": "async def reward(completion): raise KeyError('x')",
    "async exits": "async def reward(completion): raise SystemExit",
} | {name: f"def reward(completion, answer):\n    {body}" for name, body in BODIES.items()}


def rollout() -> Rollout:
    return Rollout(
        prompt=Prompt(uid="row7", token_ids=np.array([1], np.int32), answer="a"),
        token_ids=np.array([2], np.int32),
        logps=np.zeros(1, np.float32),
        finish_reason=FinishReason.stop,
        version=0,
        text="x",
    )


def require_one_sentence(message: str, *parts: str) -> None:
    assert "\n" not in message
    assert len(message) < 500
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", HEADS)
def test_a_reward_function_that_fails_is_named_with_its_row(tmp_path: Path, name: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(HEADS[name])
    setting = f"{file}:reward"
    function = reward_function(FunctionRewardConfig(function=setting), EvalConfig())
    teacher = RewardedTeacher(
        NoTeacher(vocab_size=9, max_length=9),
        lambda those: function([RewardInput(text=r.text, prompt=r.prompt) for r in those]),
        scale_rewards=True,
    )
    with pytest.raises(RunError, match=r"expected a finite number|correct the function") as error:
        teacher.score([rollout()])
    require_one_sentence(str(error.value), "prompt row7", f"reward.function={setting}")


@pytest.mark.parametrize("parameters", ["a, b, c", "completion, b"])
def test_a_reward_function_of_other_parameters_is_refused(tmp_path: Path, parameters: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def reward({parameters}): return 1.0")
    setting = f"{file}:reward"
    with pytest.raises(ValueError, match="expected some of completion, answer, prompt") as error:
        reward_function(FunctionRewardConfig(function=setting), EvalConfig())
    require_one_sentence(str(error.value), f"reward.function={setting}", parameters)


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(1)",
        "raise ValueError('x\\ny')",
        "1/0",
        "def (",
        "nowhere",
        "import nowhere",
        "\0",
        "reward = 3",
        "def other(): pass",
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path, source: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(ValueError, match=r"cannot be imported|not a function") as error:
        load_function("reward.function", f"{file}:reward")
    require_one_sentence(str(error.value), "reward.function=")


@pytest.mark.parametrize("name", ["raises", "exits", "recurses", "own error", "list", "text"])
def test_a_data_function_that_fails_is_named_with_its_row(tmp_path: Path, name: str) -> None:
    file, rows = tmp_path / "mine.py", tmp_path / "rows.jsonl"
    file.write_text(f"def reward(completion, answer=None):\n    {BODIES[name]}")
    rows.write_text('{"prompt": "x"}\n')
    data = DataConfig(function=f"{file}:reward")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: data\.function=") as error:
        list(source_rows(str(rows), data))
    require_one_sentence(str(error.value))
