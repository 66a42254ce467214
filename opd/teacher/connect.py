"""The servers that a teacher setting names, their clients, and the info of each teacher."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import AutoTokenizer

from opd.checkpoint.tensors import torch_dtype
from opd.config.student import DType
from opd.config.teacher import (
    PoolTeacherConfig,
    ServedTeacherConfig,
    ServerTeacherConfig,
    TeacherConfig,
    TeacherTokenizer,
)
from opd.interfaces import Progress
from opd.model_head import read_model_config
from opd.teacher.client import ServerTeacher, server_connection
from opd.teacher.model_info import max_positions, read_info, require_divisible_heads
from opd.teacher.sleeping import SleepSwitch
from opd.teacher.transport import describe_costs
from opd.teacher.vocabulary import (
    Vocabulary,
    common_vocab_size,
    read_vocabulary,
    require_fit,
)
from opd.teacher.wire import TOKEN_VARIABLE
from opd.types import ScoreRequest, TeacherInfo

TEACHER_URLS = "OPD_TEACHER_URLS"
"""Environment variable: the servers that the launcher started, as JSON, model -> urls."""


def listed_urls(setting: str) -> tuple[str, ...]:
    """The addresses in a comma-separated setting, each once."""
    return tuple(dict.fromkeys(part.strip() for part in setting.split(",") if part.strip()))


def member_urls(member: str) -> tuple[str, ...]:
    """The addresses that a pool member lists; none when it is a model."""
    listed = listed_urls(member)
    return listed if all(u.startswith(("http://", "https://")) for u in listed) else ()


def pool_models(members: Mapping[str, str]) -> list[str]:
    """The models of a pool that need servers, each once."""
    return list(dict.fromkeys(m for m in members.values() if not member_urls(m)))


def started_models(config: TeacherConfig) -> list[str]:
    """The model of each teacher server that a run starts itself, replicas of one model together."""
    match config:
        case ServerTeacherConfig(url=None, model=str(model), replicas=replicas):
            return [model] * replicas
        case PoolTeacherConfig(members=members, replicas=replicas):
            return [model for model in pool_models(members) for _ in range(replicas)]
    return []


def server_client(
    config: ServedTeacherConfig,
    url: str,
    student: Vocabulary,
    request: ScoreRequest,
    progress: Progress | None = None,
) -> ServerTeacher:
    """A client of one server, with the run's token, time-out and retries."""
    return ServerTeacher(
        url,
        config,
        request=request,
        student=student,
        token=os.environ.get(TOKEN_VARIABLE),
        progress=progress,
    )


def scored_vocabulary(config: TeacherConfig, student: Vocabulary) -> Vocabulary:
    """The vocabulary whose ids the teacher gets: the student's, or with tokenizer=own its own."""
    if config.tokenizer == TeacherTokenizer.shared:
        return student
    assert config.model is not None, "a rule requires teacher.model with tokenizer=own"
    vocabulary = read_vocabulary(
        AutoTokenizer.from_pretrained(config.model),
        read_model_config(config.model, setting="teacher.model").get_text_config().vocab_size,
    )
    return replace(
        vocabulary,
        owner=f"teacher.model={config.model}",
        remedy="name the model that the server has with teacher.model",
    )


def sleep_switch(config: ServedTeacherConfig, urls: Sequence[str]) -> SleepSwitch:
    """What puts these servers to sleep and wakes them, with the run's token."""
    token = os.environ.get(TOKEN_VARIABLE)
    return SleepSwitch([server_connection(config, url, token) for url in urls])


def describe_transport(
    config: TeacherConfig,
    infos: Sequence[TeacherInfo],
    student: Vocabulary,
    request: ScoreRequest,
    support_k: int,
) -> str:
    """How the responses of these teachers are encoded and what that costs, one line per encoding.

    ``support_k`` is the number of ids that a rollout names per token.
    """
    lines = [
        describe_costs(
            info,
            request,
            vocab_size=common_vocab_size(student.matrix_size, info),
            hidden_dtype=config.hidden_dtype,
            named=support_k,
        )
        for info in infos
    ]
    return "\n".join(dict.fromkeys(lines))


def teacher_infos(config: TeacherConfig, student: Vocabulary) -> list[TeacherInfo]:
    """The info of each teacher or server, before it is loaded, in the order of the setting.

    Raises ValueError when one cannot be reached or read, or when its vocabulary does not fit.
    """
    match config:
        case PoolTeacherConfig(members=members):
            return [
                info
                for name, member in members.items()
                for info in _member_infos(config, f"teacher.members.{name}", member, student)
            ]
        case ServerTeacherConfig(url=str(urls)):
            return [_served_info(config, "teacher.url", u, student) for u in listed_urls(urls)]
    assert config.model is not None
    return [_read_info(config, "teacher.model", config.model, student)]


def _member_infos(
    config: PoolTeacherConfig, setting: str, member: str, student: Vocabulary
) -> list[TeacherInfo]:
    urls = member_urls(member)
    if urls:
        return [_served_info(config, setting, url, student) for url in urls]
    return [_read_info(config, setting, member, student)]


def _served_info(
    config: ServedTeacherConfig, setting: str, url: str, student: Vocabulary
) -> TeacherInfo:
    impatient = replace(config, timeout=10, retries=1)
    try:
        return server_client(impatient, url, student, ScoreRequest()).info()
    except ConnectionError as error:
        raise ValueError(f"{setting}={url} cannot be reached: {error}, or give a model") from None


def _read_info(config: TeacherConfig, setting: str, model: str, student: Vocabulary) -> TeacherInfo:
    read_model_config(model, setting=setting)
    try:
        info = read_info(
            model,
            max_length=config.max_model_len or max_positions(model),
            dtype=None if config.dtype == DType.auto else torch_dtype(config.dtype.value),
        )
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{setting}={model} cannot be read as a model folder or Hub id ({first})"
        ) from None
    require_fit(info, student)
    if isinstance(config, ServedTeacherConfig):
        require_divisible_heads(model, config.tensor_parallel_size or 1)
    return info
