"""The comparisons before a first step: the student scored by itself, and changed weights in the engine."""

import io
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from opd.assembly.loss import build_loss
from opd.assembly.rollout import in_process
from opd.assembly.training import Training, build_training
from opd.checkpoint.tensors import open_checkpoint
from opd.config.launch import LaunchEngine
from opd.config.mask import MaskConfig
from opd.config.record import RecordConfig
from opd.config.rollout import training_sampling
from opd.config.schema import Config
from opd.config.student import DType
from opd.config.sync import DEFAULT_MAX_GAP
from opd.config.teacher import (
    LocalTeacherConfig,
    PoolTeacherConfig,
    ServerTeacherConfig,
    TeacherConfig,
)
from opd.config.tracking import TrackingConfig
from opd.config.uld import UldLossConfig
from opd.head import head_logps
from opd.spans import CommonVocabulary
from opd.teacher.alignment import Span
from opd.teacher.backend import Backend
from opd.teacher.local import LocalTeacher
from opd.teacher.model_info import max_positions, read_info, read_spec
from opd.teacher.own_tokenizer import span_rows
from opd.teacher.self_teacher import ModuleBackend
from opd.teacher.vocabulary import read_vocabulary
from opd.tracking.console import SilentProgress
from opd.train.student import causal_lm
from opd.types import FinishReason, Prompt, Rollout, ScoredRollout, ScoreRequest

TOKENS = 8
SMALL = 2 << 30
"""Bytes of the largest checkpoint that `opd doctor` loads; for larger ones the run does this check."""


def applies(config: Config) -> bool:
    """Whether the loss needs a teacher and every rank has whole weights."""
    sharded = config.launch.engine == LaunchEngine.deepspeed and config.zero == 3
    return config.loss.needs_teacher and not sharded


def compare_at_start(config: Config, training: Training) -> list[str]:
    """Resume, and compare what a run compares before its first step; a line for each. Collective.

    Building ``training`` has compared student and local teachers with their models' own forward pass.
    Raises ValueError or SyncMismatch when a comparison fails.
    """
    lines = ["the student's log-probs are those of the model's own forward pass"]
    if training.checkpoint is None and applies(config):
        loss = self_loss(config, training)
        lines.append(f"the student scored by itself: loss {loss:.2g} nats a token")
    training.resume()
    gap = training.check_sync()
    if gap is not None:
        lines.append(f"the engine after a push of changed weights: gap {gap:.2g} nats")
    return [*lines, training.layout]


def compare_alone(config: Config) -> list[str] | None:
    """``compare_at_start`` in this process, for `opd doctor`; None for large models and teacher pools.

    One process without a mask and DeepSpeed; servers that the run would start are replaced by the same
    models in this process.
    """
    teacher: TeacherConfig = config.teacher
    if isinstance(teacher, ServerTeacherConfig) and teacher.url is None:
        teacher = LocalTeacherConfig(
            model=teacher.model, dtype=teacher.dtype, tokenizer=teacher.tokenizer
        )
    models = [config.student.model, *([teacher.model] if teacher.model else [])]
    if isinstance(teacher, PoolTeacherConfig) or any(map(_is_large, models)):
        return None
    launch = replace(config.launch, engine=LaunchEngine.torch, processes=1)
    alone = replace(
        config,
        launch=launch,
        mask=MaskConfig(),
        teacher=teacher,
        rollout=in_process(config.rollout),
        tracking=TrackingConfig(),
        record=RecordConfig(),
    )
    with TemporaryDirectory(prefix="opd-doctor-") as folder:
        training = build_training(alone, Path(folder), {}, io.StringIO(), None)
        return compare_at_start(alone, training)


def _is_large(model: str) -> bool:
    return sum(t.numel * t.dtype.itemsize for t in open_checkpoint(model).values()) > SMALL


def self_loss(config: Config, training: Training) -> float:
    """|loss| in nats per token when the learner's own module is the teacher; collective.

    Covers the scoring head, support and tail or hidden states, chunks and loss. Raises ValueError when
    it is not nearly 0.
    """
    tokenizer, prompts = training.tokenizer, training.prompts
    learner, model = training.learner, training.model
    student = config.student.model
    request = config.loss.request(config.rollout.temperature)
    backend = ModuleBackend(
        causal_lm(model),
        info=read_info(student, max_length=max_positions(student)),
        spec=read_spec(student),
        max_tokens=1 << 14,
    )
    teacher = LocalTeacher(
        backend,
        request=request,
        student=read_vocabulary(tokenizer.tokenizer, tokenizer.vocab_size),
        hidden_dtype=DType.float32,
        progress=SilentProgress(),
    )
    rollout = _rollout(prompts.train[0], training_sampling(config).support_k)
    scored = [_with_full_logps(each, backend, request) for each in teacher.score([rollout])]
    if isinstance(config.loss, UldLossConfig):
        scored = [_aligned_with_itself(each) for each in scored]
    itself = CommonVocabulary.identical(tokenizer.vocab_size)
    loss = build_loss(replace(config.loss, reward_weight=0.0), itself)
    loss_value = abs(learner.measure(scored, loss)["loss/total"])
    bound = DEFAULT_MAX_GAP[config.train.precision]
    if not loss_value <= bound:
        raise ValueError(
            f"the student scored by itself has a loss of {loss_value:.3g} nats a token, allowed is "
            f"{bound:g}: its head or its attention is computed differently in scoring and in learning; "
            "try student.attn_implementation=eager, and report the model"
        )
    return loss_value


def _with_full_logps(
    scored: ScoredRollout, backend: Backend, request: ScoreRequest
) -> ScoredRollout:
    """Log-probs in place of hidden states, because the learner would apply the teacher's head to these."""
    if scored.hidden is None:
        return scored
    hidden_ND = torch.from_numpy(scored.hidden).to(backend.head_VD.device)
    logp_NV = head_logps(hidden_ND, backend.head_VD, backend.spec, request.temperature)
    return replace(scored, hidden=None, full_logps=logp_NV.cpu().numpy())


def _aligned_with_itself(scored: ScoredRollout) -> ScoredRollout:
    """Every token is a span of its own."""
    spans = [Span(t, t + 1, t, t + 1) for t in range(len(scored.rollout.token_ids))]
    assert scored.logps is not None, "a teacher returns the log-probs of the tokens"
    return replace(scored, spans=span_rows(spans, scored.rollout.token_ids, scored.logps))


def _rollout(prompt: Prompt, support_k: int) -> Rollout:
    """A few tokens of a prompt used as a completion, so that no engine is needed."""
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
