"""Several teachers, servers and prompt formats: each rollout gets its own teacher's scores, in order."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd.assembly.teacher import build_clients
from opd.config.launch import LaunchConfig
from opd.config.schema import Config
from opd.config.student import DType
from opd.config.teacher import (
    LocalTeacherConfig,
    PoolTeacherConfig,
    ServerTeacherConfig,
    TeacherBackend,
    TeacherServerConfig,
)
from opd.run.place import place
from opd.run.placement import Cards
from opd.run.teacher_servers import running_teacher, started_teachers
from opd.serving.child import RunningService
from opd.teacher.backend_torch import TorchBackend
from opd.teacher.client import ServerTeacher
from opd.teacher.connect import teacher_infos
from opd.teacher.local import LocalTeacher
from opd.teacher.pool import BalancedTeacher, RoutedTeacher
from opd.teacher.vocabulary import Vocabulary, read_vocabulary
from opd.tracking.console import SilentProgress
from opd.types import FinishReason, Prompt, Rollout, ScoredRollout, ScoreRequest
from opd.world import World

VOCAB, EXACT, TOKEN = 97, 1e-4, "shared"
REQUEST = ScoreRequest(top_k=3, temperature=0.8)


@pytest.fixture(scope="session", autouse=True)
def _quiet_offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def _checkpoint(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    words = models.WordLevel({f"t{i}": i for i in range(90)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="t0")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two teachers of one tokenizer."""
    names = {"addition": 1, "spelling": 2}
    return {name: _checkpoint(tmp_path_factory.mktemp(name), seed) for name, seed in names.items()}


@pytest.fixture(scope="module")
def student(folders: dict[str, Path]) -> Vocabulary:
    return read_vocabulary(PreTrainedTokenizerFast.from_pretrained(folders["addition"]), VOCAB)


@pytest.fixture(scope="module")
def local(folders: dict[str, Path], student: Vocabulary) -> dict[str, LocalTeacher]:
    return {
        name: LocalTeacher(
            TorchBackend(str(folder), LocalTeacherConfig(dtype=DType.float32)),
            request=REQUEST,
            student=student,
        )
        for name, folder in folders.items()
    }


@pytest.fixture
def servers(folders: dict[str, Path], tmp_path: Path) -> Iterator[dict[str, list[RunningService]]]:
    """Two of the first teacher, one of the second."""
    with ExitStack() as stack:

        def started(name: str, number: int) -> RunningService:
            config = TeacherServerConfig(
                model=str(folders[name]), backend=TeacherBackend.torch, dtype=DType.float32
            )
            log = tmp_path / f"{name}_{number}.log"
            return stack.enter_context(
                running_teacher(config, log_path=log, token=TOKEN, wait_s=300)
            )

        yield {
            "addition": [started("addition", 0), started("addition", 1)],
            "spelling": [started("spelling", 0)],
        }


def _client(url: str, student: Vocabulary) -> ServerTeacher:
    config = ServerTeacherConfig(timeout=300, retries=1)
    return ServerTeacher(
        url, config, request=REQUEST, student=student, token=TOKEN, batch_tokens=60
    )


def _balanced(services: list[RunningService], student: Vocabulary) -> BalancedTeacher:
    return BalancedTeacher([partial(_client, s.url, student) for s in services])


def _rollouts(count: int, teachers: list[str | None]) -> list[Rollout]:
    random = np.random.default_rng(count)

    def ids(length: int) -> np.ndarray:
        return random.integers(0, VOCAB, length).astype(np.int32)

    return [
        Rollout(
            prompt=Prompt(
                uid=f"p{i}", token_ids=ids(1 + i % 7), teacher=teachers[i % len(teachers)]
            ),
            token_ids=(written := ids(1 + i % 40)),
            logps=np.zeros(len(written), np.float32),
            finish_reason=FinishReason.length,
            version=0,
        )
        for i in range(count)
    ]


def _require_same(
    found: list[ScoredRollout], expected: list[ScoredRollout], rollouts: list[Rollout]
) -> None:
    assert len(found) == len(expected) == len(rollouts)
    for one, other, rollout in zip(found, expected, rollouts, strict=True):
        assert one.rollout is rollout
        assert one.logps == pytest.approx(other.logps, abs=EXACT)
        assert one.support is not None
        assert other.support is not None
        assert one.support.tail_logp == pytest.approx(other.support.tail_logp, abs=EXACT)


def test_a_server_that_is_killed_costs_retries_and_no_samples(
    servers: dict[str, list[RunningService]], student: Vocabulary, local: dict[str, LocalTeacher]
) -> None:
    rollouts = _rollouts(600, [None])
    expected = local["addition"].score(rollouts)
    teacher = _balanced(servers["addition"], student)
    _require_same(teacher.score(rollouts), expected, rollouts)
    found: list[ScoredRollout] = []
    scoring = Thread(target=lambda: found.extend(teacher.score(rollouts)))
    scoring.start()
    time.sleep(0.3)
    assert scoring.is_alive(), "the server dies while there is work"
    os.kill(servers["addition"][0].pid, signal.SIGKILL)
    scoring.join()
    _require_same(found, expected, rollouts)
    assert teacher.head() == pytest.approx(local["addition"].head())
    os.kill(servers["addition"][1].pid, signal.SIGKILL)
    with pytest.raises(ConnectionError, match="opd teacher"):
        teacher.score(rollouts[:3])


def test_a_server_that_was_away_is_tried_again(
    servers: dict[str, list[RunningService]], student: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd.teacher.pool.COOLDOWN_S", 0.0)
    up, late = (s.url for s in servers["addition"])
    attempts: list[str] = []

    def away() -> ServerTeacher:
        attempts.append("late")
        if len(attempts) < 3:
            raise ConnectionError("not yet")
        return _client(late, student)

    teacher = BalancedTeacher([partial(_client, up, student), away])
    rollouts = _rollouts(60, [None])
    assert len(teacher.score(rollouts)) == 60
    assert len(attempts) == 3


def test_each_prompt_is_scored_by_the_teacher_that_it_names(
    servers: dict[str, list[RunningService]], student: Vocabulary, local: dict[str, LocalTeacher]
) -> None:
    teacher = RoutedTeacher(
        {
            "addition": _balanced(servers["addition"], student),
            "spelling": _client(servers["spelling"][0].url, student),
        }
    )
    rollouts = _rollouts(50, ["addition", "spelling", "spelling"])
    expected = [local[str(r.prompt.teacher)].score([r])[0] for r in rollouts]
    _require_same(teacher.score(rollouts), expected, rollouts)
    assert teacher.head("spelling") == pytest.approx(local["spelling"].head())
    assert teacher.info() == teacher.info()
    assert teacher.score([]) == []
    for name in ("history", None):
        with pytest.raises(ValueError, match="there are addition, spelling"):
            teacher.score(_rollouts(1, [name]))


def test_servers_of_different_teachers_do_not_share_a_name(
    folders: dict[str, Path],
    servers: dict[str, list[RunningService]],
    student: Vocabulary,
    tmp_path: Path,
) -> None:
    shorter = TeacherServerConfig(
        model=str(folders["spelling"]), backend=TeacherBackend.torch, max_model_len=64
    )
    with (
        running_teacher(shorter, log_path=tmp_path / "log", token=TOKEN, wait_s=300) as other,
        pytest.raises(ValueError, match="different teachers"),
    ):
        _balanced([servers["addition"][0], other], student)


def test_the_teacher_sees_its_own_prompt(
    servers: dict[str, list[RunningService]], student: Vocabulary, local: dict[str, LocalTeacher]
) -> None:
    (plain,) = _rollouts(1, [None])
    seen = np.arange(30, dtype=np.int32)
    privileged = replace(plain, prompt=replace(plain.prompt, teacher_ids=seen))
    as_if = replace(plain, prompt=replace(plain.prompt, token_ids=seen))
    served = _client(servers["spelling"][0].url, student)
    (expected,) = local["spelling"].score([as_if])
    for teacher in (local["spelling"], served):
        (scored,) = teacher.score([privileged])
        assert scored.logps == pytest.approx(expected.logps, abs=EXACT)
        assert np.abs(scored.logps - teacher.score([plain])[0].logps).max() > 0.01
    too_long = replace(plain.prompt, teacher_ids=np.zeros(300, np.int32))
    with pytest.raises(ValueError, match="301 tokens with its prompt"):
        served.score([replace(plain, prompt=too_long)])


def test_a_run_starts_replicas_of_one_teacher(
    folders: dict[str, Path],
    student: Vocabulary,
    local: dict[str, LocalTeacher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ServerTeacherConfig(
        model=str(folders["addition"]),
        backend=TeacherBackend.torch,
        dtype=DType.float32,
        replicas=2,
        retries=1,
    )
    quiet = SilentProgress()
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    rollouts = _rollouts(600, [None])
    expected = local["addition"].score(rollouts)
    with pytest.raises(ValueError, match=r"give its address as teacher\.url"):
        build_clients(config, student, [REQUEST], world, quiet)
    run = Config(teacher=config, launch=LaunchConfig(processes=1))
    with started_teachers(run, place(run, Cards(count=0)), tmp_path) as started:
        for name, value in started.environment.items():
            monkeypatch.setenv(name, value)
        assert len(list(tmp_path.glob("teacher_*.log"))) == 2
        (teacher,) = build_clients(config, student, [REQUEST], world, quiet)
        _require_same(teacher.score(rollouts), expected, rollouts)
        (override,) = OverridesParser.create().parse_overrides(started.settings)
        named = replace(config, model=None, url=str(override.value()))
        assert [i.vocab_size for i in teacher_infos(named, student)] == [VOCAB] * 2
        (again,) = build_clients(named, student, [REQUEST], world, quiet)
        first, second = str(override.value()).split(",")
        monkeypatch.delenv("OPD_TEACHER_URLS")
        _require_same(again.score(rollouts[:50]), expected[:50], rollouts[:50])
        with pytest.raises(ValueError, match=r"teacher\.url=http://127.0.0.1:9 cannot be reached"):
            teacher_infos(replace(named, url=f"{first},http://127.0.0.1:9"), student)
        with pytest.raises(ValueError, match="is no address of the teacher"):
            teacher_infos(replace(named, url=f"{second},localhost:8000"), student)


def test_a_run_starts_its_pool(
    folders: dict[str, Path],
    student: Vocabulary,
    local: dict[str, LocalTeacher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = {
        "addition": str(folders["addition"]),
        "sums": str(folders["addition"]),
        "spelling": str(folders["spelling"]),
    }
    config = PoolTeacherConfig(members=members, backend=TeacherBackend.torch, dtype=DType.float32)
    quiet = SilentProgress()
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    rollouts = _rollouts(20, ["sums", "spelling", "addition"])
    with pytest.raises(ValueError, match="start one with `opd teacher`"):
        build_clients(config, student, [REQUEST], world, quiet)
    run = Config(teacher=config, launch=LaunchConfig(processes=1))
    with started_teachers(run, place(run, Cards(count=0)), tmp_path) as started:
        for name, value in started.environment.items():
            monkeypatch.setenv(name, value)
        assert len(list(tmp_path.glob("*.log"))) == 2, "the same weights are served once"
        _, teacher = build_clients(config, student, [ScoreRequest(), REQUEST], world, quiet)
        found = teacher.score(rollouts)
        overrides = OverridesParser.create().parse_overrides(started.settings)
        urls = {o.key_or_group.split(".")[2]: o.value() for o in overrides}
        named = replace(config, members=urls)
        assert [i.vocab_size for i in teacher_infos(named, student)] == [VOCAB] * 3
    names = {"sums": "addition"}
    expected = [
        local[names.get(str(r.prompt.teacher), str(r.prompt.teacher))].score([r])[0]
        for r in rollouts
    ]
    _require_same(found, expected, rollouts)
