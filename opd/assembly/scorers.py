"""Who scores a step: a teacher, the student itself, nobody; and a verifier beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd.assembly.numbers import torch_dtype
from opd.assembly.teacher import build_teacher
from opd.assembly.text import Text
from opd.config.schema import Config
from opd.config.models import DType, LoraConfig, SelfTeacher, SelfTeacherConfig
from opd.config.rewards import FunctionRewardConfig, GraderRewardConfig, MeasuredRewardConfig
from opd.config.rules import has_teacher
from opd.interfaces import Progress, Teacher
from opd.types import Rollout, ScoreRequest

if TYPE_CHECKING:
    import torch

    from opd.sync.ema import EMAWeights
    from opd.teacher.backend import Backend
    from opd.teacher.vocabulary import Vocabulary
    from opd.world import World

Live = Callable[[], Any]
"""Gives the learner's transformers (or peft) model, once it is built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teachers:
    """One teacher behind three clients.

    ``training`` is asked what the loss wants, with rewards; ``whole`` for the full distribution and
    ``sampled`` for the tokens written, both None without a teacher. ``average`` follows the student.
    """

    training: Teacher
    whole: Teacher | None = None
    sampled: Teacher | None = None
    average: "EMAWeights | None" = None

    def version(self) -> int:
        """Counts up when the teacher's weights have moved."""
        return 0 if self.average is None else self.average.version


def build_scorers(
    config: Config,
    text: Text,
    student: "Vocabulary",
    wanted: ScoreRequest,
    world: "World",
    progress: Progress,
    live: Live,
) -> Teachers:
    """Everybody who says something about what was written; ValueError if a teacher does not fit."""
    from opd.teacher.no_teacher import NoTeacher

    nobody = NoTeacher(vocab_size=text.vocab_size, max_length=text.max_length)
    if not has_teacher(config):
        return Teachers(training=_rewarded(config, nobody, text))
    asked = [
        wanted,
        ScoreRequest(full=True, temperature=wanted.temperature),
        ScoreRequest(temperature=wanted.temperature),
    ]
    average = None
    if isinstance(config.teacher, SelfTeacherConfig):
        backend, average = _itself(config, config.teacher, world, live)
        teachers = _clients(backend, config.teacher, asked, student, progress)
    else:
        teachers = build_teacher(config.teacher, student, asked, world, progress)
    training, whole, sampled = teachers
    return Teachers(
        training=_rewarded(config, training if wanted.sampled else nobody, text),
        whole=whole,
        sampled=sampled,
        average=average,
    )


def _clients(
    backend: "Backend",
    config: SelfTeacherConfig,
    wanted: Sequence[ScoreRequest],
    student: "Vocabulary",
    progress: Progress,
) -> list[Teacher]:
    from opd.teacher.local import LocalTeacher

    return [
        LocalTeacher(
            backend,
            wanted=want,
            student=student,
            batch_tokens=config.batch_tokens,
            hidden_dtype=DType.float32,  # nothing travels
            progress=progress,
        )
        for want in wanted
    ]


def _itself(
    config: Config, teacher: SelfTeacherConfig, world: "World", live: Live
) -> tuple["Backend", "EMAWeights | None"]:
    """The student's model as a back end, and what lets it follow the student."""
    from opd.sync.ema import EMAWeights
    from opd.teacher.model_info import longest, read_info, read_spec
    from opd.teacher.self_teacher import ModuleBackend

    model = config.student.model
    info = read_info(model, max_length=teacher.max_length or longest(model))
    spec = read_spec(model)
    if teacher.weights == SelfTeacher.frozen and isinstance(config.adapter, LoraConfig):
        from opd.train.student import causal_lm

        adapted = ModuleBackend(
            lambda: causal_lm(live()),
            info=info,
            spec=spec,
            batch_tokens=teacher.batch_tokens,
            around=lambda: live().disable_adapter(),
        )
        return adapted, None
    copy = _copy(config, teacher).to(world.device)
    backend = ModuleBackend(lambda: copy, info=info, spec=spec, batch_tokens=teacher.batch_tokens)
    if teacher.weights == SelfTeacher.frozen:
        return backend, None
    decay = teacher.decay if teacher.weights == SelfTeacher.ema else 0.0
    return backend, EMAWeights(copy, decay=decay)


def _copy(config: Config, teacher: SelfTeacherConfig) -> "torch.nn.Module":
    from opd.train.weights import load_student

    dtype = DType.float32 if teacher.dtype == DType.auto else teacher.dtype
    copy = load_student(
        config.student.model,
        dtype=torch_dtype(dtype),
        attention=config.student.attention,
        trust_remote_code=config.student.trust_remote_code,
    )
    return copy.eval().requires_grad_(False)


def _rewarded(config: Config, teacher: Teacher, text: Text) -> Teacher:
    if not isinstance(config.reward, MeasuredRewardConfig):
        return teacher
    from opd.teacher.rewarded import RewardedTeacher

    judge = build_reward(config)

    def reward(rollout: Rollout) -> float:
        return judge(text.decode(rollout.token_ids.tolist()), rollout.prompt.answer)

    return RewardedTeacher(teacher, reward, scale=config.reward.scale)


def build_reward(config: Config) -> Callable[[str, str | None], float]:
    """(completion, answer) -> reward; ValueError where your function cannot be imported."""
    from opd.evaluate.grade import grader
    from opd.evaluate.reward import graded, named_function

    match config.reward:
        case GraderRewardConfig(grader=kind, marker=marker):
            chosen = kind or config.eval.grader
            return graded(grader(chosen.value, marker or config.eval.marker))
        case FunctionRewardConfig(function=name):
            return named_function(name)
    raise AssertionError(f"no reward for {type(config.reward).__name__}")
