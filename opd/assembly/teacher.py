"""What scores rollouts: one teacher or several, the student itself, or none; and the reward."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opd.assembly.served_teacher import put_to_sleep, served_clients
from opd.assembly.tokenizers import tokenizer_pair
from opd.checkpoint.tensors import torch_dtype
from opd.config.adapter import LoraConfig
from opd.config.reward import GroupRewardConfig
from opd.config.schema import Config
from opd.config.student import DType
from opd.config.teacher import (
    LocalTeacherConfig,
    PoolTeacherConfig,
    SelfTeacher,
    SelfTeacherConfig,
    ServedTeacherConfig,
    TeacherConfig,
    TeacherTokenizer,
    has_teacher,
)
from opd.data.tokenizer import StudentTokenizer
from opd.evaluate.reward import RewardInput, reward_function
from opd.interfaces import Progress, Teacher
from opd.spans import CommonVocabulary
from opd.sync.ema import EMAWeights
from opd.teacher.backend import Backend
from opd.teacher.backend_torch import TorchBackend
from opd.teacher.checked import CheckedTeacher
from opd.teacher.connect import scored_vocabulary
from opd.teacher.local import LocalTeacher
from opd.teacher.model_info import max_positions, read_info, read_spec
from opd.teacher.no_teacher import NoTeacher
from opd.teacher.own_tokenizer import OwnTokenizerTeacher
from opd.teacher.rewarded import RewardedTeacher
from opd.teacher.self_teacher import ModuleBackend
from opd.teacher.vocabulary import Vocabulary
from opd.train.student import TeacherHeads, causal_lm
from opd.train.weights import checkpoint_views, load_student
from opd.types import Rollout, ScoreRequest
from opd.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Teachers:
    """One teacher behind three clients.

    ``training`` scores what the loss needs, with rewards; ``whole`` the full distribution and
    ``sampled`` the sampled tokens, both None without a teacher. ``heads`` turn its hidden states into
    logits. ``average`` is the moving average of the student, where that is the teacher. A teacher with its
    own tokenizer has no ``whole`` distribution over the student's ids; ``common`` are the tokens of both.
    """

    training: Teacher
    heads: TeacherHeads
    whole: Teacher | None = None
    sampled: Teacher | None = None
    average: EMAWeights | None = None
    common: CommonVocabulary | None = None


def no_teachers(tokenizer: StudentTokenizer, world: World) -> Teachers:
    """``Teachers`` without a teacher."""
    none = _no_teacher(tokenizer)
    return Teachers(training=none, heads=TeacherHeads(none, 1, world.device))


def build_teachers(
    config: Config,
    model: torch.nn.Module,
    tokenizer: StudentTokenizer,
    student: Vocabulary,
    world: World,
    progress: Progress,
) -> Teachers:
    """The teachers of a run; ValueError if one does not fit.

    ``model`` is the learner's transformers (or peft) model, which a self-teacher reads.
    """
    none = _no_teacher(tokenizer)
    if not has_teacher(config):
        rewarded = _with_reward(config, none, tokenizer)
        return Teachers(training=rewarded, heads=TeacherHeads(none, 1, world.device))
    request = config.loss.request(config.rollout.temperature)
    requests = [
        request,
        ScoreRequest(full=True, temperature=request.temperature),
        ScoreRequest(temperature=request.temperature),
    ]
    copy = None
    if isinstance(config.teacher, SelfTeacherConfig):
        copy = _copy_student(config, config.teacher, world)
        backend = _self_backend(config, config.teacher, model, copy)
        limit = config.teacher.max_num_batched_tokens
        # float32: nothing is sent
        teachers = _local_clients(backend, limit, DType.float32, requests, student, progress)
    else:
        scored = scored_vocabulary(config.teacher, student)
        teachers = build_clients(config.teacher, scored, requests, world, progress)
    members = config.teacher.members if isinstance(config.teacher, PoolTeacherConfig) else ()
    heads = TeacherHeads(teachers[1], max(1, len(members)), world.device)
    checked = [CheckedTeacher(teacher) for teacher in teachers]
    training, whole, sampled = put_to_sleep(config.teacher, checked, heads, world)
    if config.teacher.tokenizer == TeacherTokenizer.own:
        return _with_own_tokenizer(config, training, sampled, heads, tokenizer)
    return Teachers(
        training=_with_reward(config, training if request.sampled else none, tokenizer),
        whole=whole,
        sampled=sampled,
        heads=heads,
        average=_average(config.teacher, copy, heads),
    )


def _with_own_tokenizer(
    config: Config,
    training: Teacher,
    sampled: Teacher,
    heads: TeacherHeads,
    student: StudentTokenizer,
) -> Teachers:
    """Clients that score the teacher's own tokens, as teachers of the student's."""
    request = config.loss.request(config.rollout.temperature)
    pair, teacher_rows = tokenizer_pair(config, student)
    scoring = OwnTokenizerTeacher(training, pair, full=request.full)
    return Teachers(
        training=_with_reward(
            config, scoring if request.sampled else _no_teacher(student), student
        ),
        sampled=OwnTokenizerTeacher(sampled, pair, full=False),
        heads=heads,
        common=pair.common(student.vocab_size, teacher_rows) if request.full else None,
    )


def _no_teacher(tokenizer: StudentTokenizer) -> NoTeacher:
    return NoTeacher(vocab_size=tokenizer.vocab_size, max_length=tokenizer.max_length)


def build_clients(
    config: TeacherConfig,
    student: Vocabulary,
    requests: Sequence[ScoreRequest],
    world: World,
    progress: Progress,
) -> list[Teacher]:
    """One teacher behind as many clients as there are requests."""
    match config:
        case ServedTeacherConfig():
            return served_clients(config, student, requests, progress)
        case LocalTeacherConfig(model=str(model)):
            backend = TorchBackend(model, config, device=str(world.device))
            limit = config.max_num_batched_tokens
            return _local_clients(backend, limit, config.hidden_dtype, requests, student, progress)
    raise AssertionError(f"no teacher for {type(config).__name__}")


def _local_clients(
    backend: Backend,
    max_num_batched_tokens: int,
    hidden_dtype: DType,
    requests: Sequence[ScoreRequest],
    student: Vocabulary,
    progress: Progress,
) -> list[Teacher]:
    return [
        LocalTeacher(
            backend,
            request=request,
            student=student,
            max_num_batched_tokens=max_num_batched_tokens,
            hidden_dtype=hidden_dtype,
            progress=progress,
        )
        for request in requests
    ]


def _self_backend(
    config: Config,
    teacher: SelfTeacherConfig,
    model: torch.nn.Module,
    copy: torch.nn.Module | None,
) -> Backend:
    """The student as a back end: a copy of it, or the live model with its adapters off."""
    name = config.student.model
    info = read_info(name, max_length=teacher.max_model_len or max_positions(name))
    spec, limit = read_spec(name), teacher.max_num_batched_tokens
    if copy is None:
        return ModuleBackend(
            causal_lm(model),
            info=info,
            spec=spec,
            max_tokens=limit,
            forward_context=model.disable_adapter,  # pyright: ignore[reportArgumentType]  (peft's)
        )
    return ModuleBackend(copy, info=info, spec=spec, max_tokens=limit)


def _copy_student(
    config: Config, teacher: SelfTeacherConfig, world: World
) -> torch.nn.Module | None:
    """A second copy of the student's initial weights; None where adapters can be switched off."""
    if teacher.weights == SelfTeacher.frozen and isinstance(config.adapter, LoraConfig):
        return None
    dtype = DType.float32 if teacher.dtype == DType.auto else teacher.dtype
    copy = load_student(config.student.model, config.student, dtype=torch_dtype(dtype.value))
    return copy.eval().requires_grad_(False).to(world.device)


def _average(
    teacher: TeacherConfig, copy: torch.nn.Module | None, heads: TeacherHeads
) -> EMAWeights | None:
    """The moving average that updates the copy; its head is read again after each update."""
    if not isinstance(teacher, SelfTeacherConfig) or copy is None:
        return None
    match teacher.weights:
        case SelfTeacher.frozen:
            return None
        case SelfTeacher.ema:
            return EMAWeights(checkpoint_views(copy), decay=teacher.ema_decay, moved=heads.forget)
        case SelfTeacher.latest:
            return EMAWeights(checkpoint_views(copy), decay=0.0, moved=heads.forget)


def _with_reward(config: Config, teacher: Teacher, tokenizer: StudentTokenizer) -> Teacher:
    if not isinstance(config.reward, GroupRewardConfig):
        return teacher
    function = reward_function(config.reward, config.eval)

    def rewards(rollouts: Sequence[Rollout]) -> list[float]:
        texts = [tokenizer.decode(rollout.token_ids.tolist()) for rollout in rollouts]
        return function(
            [RewardInput(text=t, prompt=r.prompt) for t, r in zip(texts, rollouts, strict=True)]
        )

    return RewardedTeacher(teacher, rewards, scale_rewards=config.reward.scale_rewards)
