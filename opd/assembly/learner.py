"""The student under its training engine."""

import torch

from opd.assembly.loss import build_loss, build_reduction, return_discount
from opd.assembly.teacher import Teachers
from opd.checkpoint.tensors import open_checkpoint
from opd.config.launch import LaunchEngine, run_deepspeed
from opd.config.optim import AdamWConfig, clipped_warmup
from opd.config.record import WeightRecordConfig
from opd.config.schema import Config
from opd.config.teacher import PoolTeacherConfig, TeacherTokenizer
from opd.config.train import MaskScores
from opd.data.tokenizer import StudentTokenizer
from opd.interfaces import Progress
from opd.model_head import head_spec
from opd.packing import Packing
from opd.reference import OwnForward
from opd.train.deepspeed_engine import DeepSpeedEngine
from opd.train.engine import TrainingEngine
from opd.train.learner import StudentLearner
from opd.train.mask_scores import SquaredGradients
from opd.train.optimizers import LearningRate, build_optimizer
from opd.train.own_forward import choose_packing, require_learner_forward
from opd.train.parameter_mask import ParameterMask
from opd.train.record import NoRecord, Recorder, WeightRecorder, Write
from opd.train.student import Student, causal_lm
from opd.train.torch_engine import TorchEngine
from opd.world import World

GRADIENT_SCORES = (MaskScores.fisher, MaskScores.first_gradient)
"""Scores computed from gradients at the initial weights; no weight is updated."""


def build_learner(
    config: Config,
    model: torch.nn.Module,
    parameter_mask: ParameterMask,
    teachers: Teachers,
    tokenizer: StudentTokenizer,
    world: World,
    progress: Progress,
    write: Write,
    own: OwnForward,
) -> tuple[StudentLearner, str]:
    """The student under its training engine, once it agrees with the model's own forward pass.

    ``write`` receives the rows of record=weights; ``own`` is the student's as it was
    loaded. The sentence says how micro-batches are laid out.
    """
    student = _student(config, model, teachers, tokenizer).to(world.device)
    who = f"student.model={config.student.model}"
    student.train(not config.train.dropout)
    require_learner_forward(student, own, pad_id=tokenizer.pad_id, who=who)
    packing, layout = Packing.off, "micro-batches are padded: train.packing=false"
    if config.train.packing:
        packing, layout = choose_packing(student, own, pad_id=tokenizer.pad_id)
    optimizer = (
        SquaredGradients(student.parameters())
        if config.train.mask_scores in GRADIENT_SCORES
        else build_optimizer(student, config.optim)
    )
    engine = _engine(config, student, optimizer, parameter_mask, world)
    members = config.teacher.members if isinstance(config.teacher, PoolTeacherConfig) else ()
    learner = StudentLearner(
        engine,
        model,
        build_loss(config.loss, teachers.common),
        config.train,
        parameter_mask=parameter_mask,
        learning_rate=LearningRate(
            config.optim, steps=config.train.steps, warmup_steps=clipped_warmup(config)
        ),
        pad_id=tokenizer.pad_id,
        discount=return_discount(config.loss),
        teachers=sorted(members),
        world=world,
        progress=progress,
        reduction=build_reduction(config),
        recorder=_recorder(config, causal_lm(model), engine, world, write),
        packing=packing,
    )
    return learner, layout


def _student(
    config: Config, model: torch.nn.Module, teachers: Teachers, tokenizer: StudentTokenizer
) -> Student:
    clients = (teachers.training, teachers.whole)
    vocab_sizes = [teacher.info().vocab_size for teacher in clients if teacher is not None]
    if config.teacher.tokenizer == TeacherTokenizer.own:
        vocab_sizes = []
    return Student(
        model,
        spec=head_spec(
            causal_lm(model).config,
            min([tokenizer.vocab_size, *vocab_sizes]),
            trust_remote_code=config.student.trust_remote_code,
        ),
        temperature=config.rollout.temperature,
        chunk_bytes=config.train.chunk_mib << 20,
        teacher_head=teachers.heads,
        sequence_gaps=config.loss.correction.of_sequence,
    )


def _engine(
    config: Config,
    student: Student,
    optimizer: torch.optim.Optimizer,
    parameter_mask: ParameterMask,
    world: World,
) -> TrainingEngine:
    if config.launch.engine == LaunchEngine.torch:
        return TorchEngine(
            student,
            optimizer,
            gradients=parameter_mask.gradients,
            precision=config.train.precision,
            max_grad_norm=config.optim.max_grad_norm,
            device=world.device,
        )
    return DeepSpeedEngine(student, optimizer, config=run_deepspeed(config), world=world)


def _recorder(
    config: Config, causal: torch.nn.Module, engine: TrainingEngine, world: World, write: Write
) -> Recorder:
    if not isinstance(config.record, WeightRecordConfig):
        return NoRecord()
    updates = config.train.mask_scores not in GRADIENT_SCORES
    adam = config.optim if isinstance(config.optim, AdamWConfig) and updates else None
    return WeightRecorder(
        causal,
        engine,
        open_checkpoint(config.student.model),
        every=config.record.every,
        steps=config.train.steps,
        adam=adam,
        world=world,
        write=write,
    )
