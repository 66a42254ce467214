"""A command line of ``key=value`` words is a dataclass, and the dataclass is those words again."""

import pytest

from opd.config.arguments import as_arguments, parse_arguments
from opd.config.rollout import RolloutBackend, RolloutServerConfig
from opd.config.student import DType
from opd.config.teacher import TeacherBackend, TeacherServerConfig


def test_a_teacher_server_survives_the_command_line() -> None:
    config = TeacherServerConfig(
        model="a folder/x",
        port_file="p",
        backend=TeacherBackend.torch,
        dtype=DType.bfloat16,
        max_model_len=9,
        gpu_memory_utilization=0.25,
        exit_with_parent=True,
    )
    assert parse_arguments(TeacherServerConfig, as_arguments(config)) == config
    assert parse_arguments(TeacherServerConfig, ["model=m"]) == TeacherServerConfig(model="m")


def test_a_rollout_server_survives_the_command_line() -> None:
    config = RolloutServerConfig(
        model="no",  # YAML takes this for false
        host="::1",
        port=65535,
        backend=RolloutBackend.transformers,
        dtype=DType.float32,
        kv_cache_memory_bytes=32 << 20,
        enforce_eager=False,
        trust_remote_code=True,
        seed=7,
    )
    assert parse_arguments(RolloutServerConfig, as_arguments(config)) == config
    assert parse_arguments(RolloutServerConfig, ["model=m"]) == RolloutServerConfig(model="m")


def test_defaults_are_left_out() -> None:
    assert as_arguments(TeacherServerConfig(model="m")) == ["model=m"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["m"], "m is not of the form key=value"),
        (["model=m", "prot=1"], "prot is not a key here: did you mean port"),
        (["model=m", "model=n"], "model= is given twice, as m and as n"),
        (["model=m", "port=many"], r"port=many: expected a whole number ≥ 0, ≤ 65535"),
        (["model=m", "port=70000"], "port=70000: allowed is 65535 or less"),
        (["model=m", "dtype=int3"], "dtype=int3: expected one of auto, "),
        (["port=1"], r"model=\.\.\. is missing: Checkpoint folder"),
    ],
)
def test_a_wrong_word_is_refused_by_name(words: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_arguments(TeacherServerConfig, words)
