"""A student scored by itself has nothing to learn: loss 0, or something on the way is wrong."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from opd import build
from opd.config.schema import Config
from opd.config.models import DType
from opd.config.losses import LossConfig
from opd.config.masks import MaskConfig
from opd.config.training import LaunchEngine
from opd.config.rules import asks_a_teacher
from opd.types import FinishReason, Prompt, Rollout, ScoredRollout, ScoreRequest

if TYPE_CHECKING:
    from opd.teacher.backend import Backend
    from opd.train.learner import StudentLearner

TOKENS = 8
SMALL = 2 << 30
"""Bytes of a checkpoint that `opd doctor` loads to compute something; larger ones wait for the run."""


def applies(config: Config) -> bool:
    """Whether the loss is about a teacher, and the weights are whole where they are read."""
    sharded = config.launch.engine == LaunchEngine.deepspeed and config.zero == 3
    return asks_a_teacher(config) and not sharded


def doctors_self_loss(config: Config, text: build.Text, prompts: build.Prompts) -> float | None:
    """``self_loss`` in this process, for `opd doctor`; None where it does not apply or costs too much."""
    from opd.teacher.no_teacher import NoTeacher
    from opd.checkpoint.tensors import open_checkpoint
    from opd.tracking.console import SilentProgress
    from opd.world import join_world

    stored = open_checkpoint(config.student.model).values()
    size = sum(math.prod(s.shape) * s.dtype.itemsize for s in stored)
    if not applies(config) or size > SMALL:
        return None
    alone = replace(
        config, launch=replace(config.launch, engine=LaunchEngine.torch), mask=MaskConfig()
    )
    nobody = NoTeacher(vocab_size=text.vocab_size, max_length=text.max_length)
    learner, model = build.build_learner(
        alone,
        None,
        build.Teachers(training=nobody),
        text,
        join_world(),
        SilentProgress(),
        lambda step, row: None,
    )
    return self_loss(alone, text, prompts, learner, model)


def self_loss(
    config: Config,
    text: build.Text,
    prompts: build.Prompts,
    learner: "StudentLearner",
    model: Any,
) -> float:
    """|loss| in nats per token when the learner's own module is the teacher; collective.

    Goes the whole way: scoring head, support and tail or hidden states, chunks, loss. Raises
    ValueError when it is not nearly 0.
    """
    from opd.teacher.model_info import longest, read_info, read_spec
    from opd.teacher.self_teacher import ModuleBackend
    from opd.teacher.local import LocalTeacher
    from opd.teacher.vocabulary import vocabulary_of
    from opd.tracking.console import SilentProgress
    from opd.train.student import causal_lm

    student = config.student.model
    wanted: ScoreRequest = build.wanted_of(config.loss, config.rollout.temperature)
    backend = ModuleBackend(
        lambda: causal_lm(model),
        info=read_info(student, max_length=longest(student)),
        spec=read_spec(student),
        batch_tokens=1 << 14,
    )
    itself = LocalTeacher(
        backend,
        wanted=wanted,
        student=vocabulary_of(text.tokenizer, text.vocab_size),
        hidden_dtype=DType.float32,
        progress=SilentProgress(),
    )
    rollout = _rollout(prompts.train[0], build.sampling_of(config).support_k)
    scored = [_written_out(said, backend, wanted) for said in itself.score([rollout])]
    loss: LossConfig = replace(config.loss, reward_weight=0.0)
    found = abs(learner.measure(scored, build.build_loss(loss))["loss/total"])
    bound = build.DEFAULT_GAP[config.train.precision]
    if not found <= bound:
        raise ValueError(
            f"the student scored by itself has a loss of {found:.3g} nats a token, allowed is "
            f"{bound:g}: its head or its attention is computed differently in scoring and in learning; "
            "try student.attention=eager, and report the model"
        )
    return found


def _written_out(said: ScoredRollout, backend: "Backend", wanted: ScoreRequest) -> ScoredRollout:
    """Hidden states as log-probs: the learner applies another head to them, the teacher's."""
    if said.hidden is None:
        return said
    import torch

    from opd.head import head_logps

    hidden_ND = torch.from_numpy(said.hidden).to(backend.head_VD.device)
    logp_NV = head_logps(hidden_ND, backend.head_VD, backend.spec, wanted.temperature)
    return replace(said, hidden=None, full_logps=logp_NV.cpu().numpy())


def _rollout(prompt: Prompt, support_k: int) -> Rollout:
    """A few tokens of a prompt as if they were a completion; no engine is needed for this."""
    ids = np.resize(prompt.token_ids, TOKENS).astype(np.int32)
    support = np.tile(np.arange(support_k, dtype=np.int32), (TOKENS, 1)) if support_k else None
    return Rollout(
        prompt=replace(prompt, teacher=None, teacher_ids=None, completion_ids=None),
        token_ids=ids,
        logps=np.full(TOKENS, np.nan, np.float32),
        finish_reason=FinishReason.stop,
        version=0,
        support_ids=support,
    )
