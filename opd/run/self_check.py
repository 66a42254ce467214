"""Checks that a student scored by itself has loss 0; otherwise scoring and learning disagree."""

import math
from dataclasses import replace

import numpy as np
import torch

from opd.assembly.learner import build_learner
from opd.assembly.loss import build_loss
from opd.assembly.model import build_model
from opd.assembly.teacher import no_teachers
from opd.assembly.training import Training
from opd.checkpoint.tensors import open_checkpoint
from opd.config.launch import LaunchEngine
from opd.config.mask import MaskConfig
from opd.config.rollout import training_sampling
from opd.config.schema import Config
from opd.config.student import DType
from opd.config.sync import DEFAULT_MAX_GAP
from opd.data.prompt_sets import PromptSets
from opd.data.tokenizer import StudentTokenizer
from opd.head import head_logps
from opd.teacher.backend import Backend
from opd.teacher.local import LocalTeacher
from opd.teacher.model_info import max_positions, read_info, read_spec
from opd.teacher.self_teacher import ModuleBackend
from opd.teacher.vocabulary import read_vocabulary
from opd.tracking.console import SilentProgress
from opd.train.learner import StudentLearner
from opd.train.student import causal_lm
from opd.types import FinishReason, Prompt, Rollout, ScoredRollout, ScoreRequest
from opd.world import join_world

TOKENS = 8
SMALL = 2 << 30
"""Bytes of the largest checkpoint that `opd doctor` loads; for larger ones the run does this check."""


def applies(config: Config) -> bool:
    """Whether the loss needs a teacher and every rank has whole weights."""
    sharded = config.launch.engine == LaunchEngine.deepspeed and config.zero == 3
    return config.loss.needs_teacher and not sharded


def self_loss_alone(
    config: Config, tokenizer: StudentTokenizer, prompts: PromptSets
) -> float | None:
    """``self_loss`` in this process, for `opd doctor`; None for a large model or where it does not apply."""
    stored = open_checkpoint(config.student.model).values()
    size = sum(math.prod(s.shape) * s.dtype.itemsize for s in stored)
    if not applies(config) or size > SMALL:
        return None
    alone = replace(
        config, launch=replace(config.launch, engine=LaunchEngine.torch), mask=MaskConfig()
    )
    world = join_world()
    model, everything = build_model(alone, None, world)
    learner = build_learner(
        alone,
        model,
        everything,
        no_teachers(tokenizer, world),
        tokenizer,
        world,
        SilentProgress(),
        lambda step, row: None,
        prompts.probe,
    )
    return _self_loss(alone, tokenizer, prompts, learner, model)


def self_loss(config: Config, training: Training) -> float:
    """|loss| in nats per token when the learner's own module is the teacher; collective.

    Covers the scoring head, support and tail or hidden states, chunks and loss. Raises ValueError when
    it is not nearly 0.
    """
    return _self_loss(
        config, training.tokenizer, training.prompts, training.learner, training.model
    )


def _self_loss(
    config: Config,
    tokenizer: StudentTokenizer,
    prompts: PromptSets,
    learner: StudentLearner,
    model: torch.nn.Module,
) -> float:
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
    loss = build_loss(replace(config.loss, reward_weight=0.0))
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
