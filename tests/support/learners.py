"""One builder of learners, and the tiny models, masks and fixed scores that they are tested with."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from opd.assembly.loss import build_loss, return_discount
from opd.batch import LossReduction
from opd.checkpoint.tensors import Stored
from opd.config.launch import merged_deepspeed
from opd.config.loss import DivergenceLossConfig, LossConfig
from opd.config.mask import MaskTraining
from opd.config.optim import AdamWConfig, OptimConfig
from opd.config.student import StudentConfig
from opd.config.train import MaskScores, OnNonfinite, Precision, TrainConfig
from opd.head import HeadSpec
from opd.mask.file import Origin
from opd.mask.mask import Mask
from opd.tracking.console import SilentProgress
from opd.train.deepspeed_engine import DeepSpeedEngine
from opd.train.engine import TrainingEngine
from opd.train.learner import StudentLearner
from opd.train.mask_scores import SquaredGradients
from opd.train.optimizers import LearningRate, build_optimizer
from opd.train.parameter_mask import (
    DenseTraining,
    ParameterMask,
    RestoredTraining,
    SparseTraining,
)
from opd.train.record import WeightRecorder, Write
from opd.train.student import Student
from opd.train.torch_engine import TorchEngine
from opd.train.weights import checkpoint_layout, load_student, named_weights
from opd.types import FinishReason, Prompt, Rollout, ScoredRollout
from opd.world import World

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart" / "student"
QUICKSTART_VOCAB: int = json.loads((QUICKSTART / "config.json").read_text())["vocab_size"]
ROWS, LONGEST = 8, 11
"""Completions of a global batch, and the most tokens of one."""
FROM_GRADIENTS = (MaskScores.fisher, MaskScores.first_gradient)
"""Scores of gradients at the initial weights: such a run moves nothing."""
TINY_VOCAB, DENSITY = 61, 0.2
EMPTY = "model.layers.0.self_attn.o_proj.weight"
FULL = "model.layers.1.mlp.up_proj.weight"
"""Weights of the tiny model of which the mask keeps nothing, and everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a learner is made of.

    ``zero`` is the stage of DeepSpeed; None is the engine of plain torch. ``shards_all`` shards small
    parameters too. ``mask`` trains ``tiny_mask`` instead of everything. ``scores`` are those that the
    run watches for. ``max_tokens`` are those of a micro-batch, ``chunk_rows`` the rows of the head's
    chunks.
    """

    model: Callable[[], nn.Module]
    zero: int | None
    precision: Precision
    optim: OptimConfig
    steps: int
    max_tokens: int
    loss: LossConfig = field(default_factory=DivergenceLossConfig)
    mask: MaskTraining | None = None
    scores: MaskScores = MaskScores.none
    shards_all: bool = False
    chunk_rows: int = 7
    on_nonfinite: OnNonfinite = OnNonfinite.stop


def build_learner(setup: Setup, world: World, write: Write | None = None) -> StudentLearner:
    """``write`` takes what is recorded of the weights, every second step."""
    dtype = torch.bfloat16 if setup.precision == Precision.pure_bf16 else torch.float32
    model = setup.model().to(dtype)
    parameter_mask = _parameter_mask(setup, model)
    vocab: int = model.config.vocab_size  # pyright: ignore
    student = Student(
        model,
        spec=HeadSpec(vocab_size=vocab),
        temperature=1.0,
        chunk_bytes=setup.chunk_rows * 4 * vocab,
        teacher_head=lambda name: torch.empty(0),
        sequence_gaps=setup.loss.correction.of_sequence,
    )
    engine = _engine(setup, student, parameter_mask, world)
    return StudentLearner(
        engine,
        model,
        build_loss(setup.loss),
        TrainConfig(max_tokens_per_micro_batch=setup.max_tokens, on_nonfinite=setup.on_nonfinite),
        parameter_mask=parameter_mask,
        learning_rate=LearningRate(
            setup.optim, steps=setup.steps, warmup_steps=setup.optim.warmup_steps
        ),
        pad_id=0,
        discount=return_discount(setup.loss),
        world=world,
        progress=SilentProgress(),
        reduction=LossReduction(
            reduction=setup.loss.reduction,
            prefix_fraction=setup.loss.prefix_fraction,
            max_tokens=LONGEST,
        ),
        recorder=None if write is None else _recorder(setup, model, engine, world, write),
    )


def _parameter_mask(setup: Setup, model: nn.Module) -> ParameterMask:
    match setup.mask:
        case None:
            return DenseTraining(model)
        case MaskTraining.compact:
            return SparseTraining(model, tiny_mask(model))
        case MaskTraining.restore:
            return RestoredTraining(model, tiny_mask(model))


def _engine(
    setup: Setup, student: Student, parameter_mask: ParameterMask, world: World
) -> TrainingEngine:
    optimizer = (
        SquaredGradients(student.parameters())
        if setup.scores in FROM_GRADIENTS
        else build_optimizer(student, setup.optim)
    )
    max_grad_norm = setup.optim.max_grad_norm
    if setup.zero is None:
        return TorchEngine(
            student,
            optimizer,
            gradients=parameter_mask.gradients,
            precision=setup.precision,
            max_grad_norm=max_grad_norm,
            device=world.device,
        )
    config = merged_deepspeed(
        None, zero=setup.zero, precision=setup.precision, max_grad_norm=max_grad_norm
    )
    if setup.shards_all:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return DeepSpeedEngine(student, optimizer, config=config, world=world)


def _recorder(
    setup: Setup, model: nn.Module, engine: TrainingEngine, world: World, write: Write
) -> WeightRecorder:
    return WeightRecorder(
        model,
        engine,
        initial_weights(setup),
        every=2,
        steps=setup.steps,
        adam=setup.optim if isinstance(setup.optim, AdamWConfig) else None,
        world=world,
        write=write,
    )


def initial_weights(setup: Setup) -> dict[str, Stored]:
    """The float32 weights that training starts from, as a checkpoint gives them."""
    weights = {name: weight.detach() for name, weight in named_weights(setup.model())}
    return {
        name: Stored(shape=tuple(w.shape), dtype=w.dtype, read=lambda w=w: w)
        for name, w in weights.items()
    }


def quickstart_student() -> nn.Module:
    """The student that comes with the repository, float32."""
    config = StudentConfig(model=str(QUICKSTART))
    return load_student(config.model, config, dtype=torch.float32)


def tiny_model() -> Qwen2ForCausalLM:
    """Tied head, biases on queries, keys and values, grouped heads; weights on the bf16 grid."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=TINY_VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=64,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
    return model


def tiny_experts() -> nn.Module:
    """A mixture of experts, which memory holds fused and files in parts; weights on the bf16 grid."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=TINY_VOCAB,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
    return model


def tiny_mask(model: nn.Module) -> Mask:
    """A fifth of every tensor of the checkpoint, 1-D ones included; one kept whole and one not at all."""
    generator = torch.Generator().manual_seed(1)
    indices = {}
    shapes = dict(checkpoint_layout(model).checkpoint_shapes)
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        share = {EMPTY: 0.0, FULL: 1.0}.get(name, DENSITY)
        order = torch.randperm(numel, generator=generator)
        indices[name] = order[: round(share * numel)].sort().values.int()
    return Mask(indices=indices, shapes=shapes, origin=Origin(rule="test", base="", model="tiny"))


def fixed_scores(step: int, vocab: int) -> list[ScoredRollout]:
    """The global batch of a step: completions of uneven length, a random full teacher."""
    rng = np.random.default_rng(step)
    batch = []
    for row in range(ROWS):
        length = int(rng.integers(2, LONGEST + 1))
        logits = torch.from_numpy(rng.normal(size=(length, vocab)) * 2)
        prompt = Prompt(uid=f"{step}.{row}", token_ids=rng.integers(3, vocab, 5).astype(np.int32))
        rollout = Rollout(
            prompt=prompt,
            token_ids=rng.integers(3, vocab, length).astype(np.int32),
            logps=np.zeros(length, np.float32),
            finish_reason=FinishReason.length,
            version=step,
        )
        full_logps = torch.log_softmax(logits, -1).float().numpy()
        batch.append(ScoredRollout(rollout=rollout, full_logps=full_logps))
    return batch
