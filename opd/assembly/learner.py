"""The student under its training engine."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from opd.assembly.loss import build_loss, reckoning_of, wants_sequence_gaps
from opd.assembly.scorers import Teachers
from opd.assembly.text import Text
from opd.config.training import AdamWConfig, Watched
from opd.config.schema import Config
from opd.config.masks import DiscoverMaskConfig, FileMaskConfig, MaskConfig, MaskTraining
from opd.config.models import LoraConfig, PoolTeacherConfig
from opd.config.losses import PolicyGradientLossConfig
from opd.config.training import Precision, LaunchEngine
from opd.config.keeping import WeightRecordConfig
from opd.config.rules import active_mask
from opd.interfaces import (
    Progress,
)

if TYPE_CHECKING:
    import torch

    from opd.mask.mask import Mask
    from opd.train.parameter_mask import ParameterMask
    from opd.train.engine import TrainingEngine as Engine
    from opd.train.learner import StudentLearner
    from opd.train.record import Recorder, Write
    from opd.train.student import Student
    from opd.world import World


RUN_MASK = "mask.safetensors"
"""Where a run keeps the mask that it trains."""


def read_run_mask(config: Config, folder: Path) -> "Mask | None":
    """The mask of a run, which was put into its folder before it started; None trains everything."""
    if active_mask(config) is None:
        return None
    from opd.mask.mask import read_mask

    return read_mask(folder / RUN_MASK)


def build_learner(
    config: Config,
    mask: "Mask | None",
    scorers: Teachers,
    text: Text,
    world: "World",
    progress: Progress,
    write: "Write",
) -> tuple["StudentLearner", "torch.nn.Module"]:
    """The student under its training engine, and the transformers (or peft) model inside it.

    ``write`` takes what record=weights finds.
    """
    import torch

    from opd.head import head_spec
    from opd.train.learner import StudentLearner
    from opd.train.optimizers import build_optimizer
    from opd.train.student import Student, causal_lm
    from opd.train.mask_scores import SquaredGradients
    from opd.train.weights import load_student, with_lora

    pure = config.train.precision == Precision.pure_bf16
    model = load_student(
        config.student.model,
        dtype=torch.bfloat16 if pure else torch.float32,
        attention=config.student.attention,
        trust_remote_code=config.student.trust_remote_code,
    ).to(world.device)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
    if isinstance(config.adapter, LoraConfig):
        model = with_lora(model, config.adapter)
    parameter_mask = _confinement(config.mask, mask, model)
    teachers = (
        sorted(config.teacher.members) if isinstance(config.teacher, PoolTeacherConfig) else []
    )

    @lru_cache(maxsize=max(1, len(teachers)))
    def heads(name: str | None, version: int) -> torch.Tensor:
        assert scorers.whole is not None, "hidden states come from a teacher"
        return torch.from_numpy(scorers.whole.head(name)).to(world.device)

    spoken = [s.info().vocab_size for s in (scorers.training, scorers.whole) if s is not None]
    vocab_size = min(text.vocab_size, *spoken)
    student = Student(
        model,
        spec=head_spec(causal_lm(model).config, vocab_size),
        temperature=config.rollout.temperature,
        chunk_bytes=config.train.chunk_mib << 20,
        teacher_head=lambda name: heads(name, scorers.version()),
        sequence_gaps=wants_sequence_gaps(config.loss),
    ).to(world.device)
    optimizer = (
        SquaredGradients(student.parameters())
        if config.train.scores in (Watched.fisher, Watched.first_gradient)
        else build_optimizer(student, config.optim)
    )
    discount = config.loss.discount if isinstance(config.loss, PolicyGradientLossConfig) else 0.0
    engine = _training_engine(config, student, optimizer, parameter_mask, world)
    learner = StudentLearner(
        engine,
        model,
        build_loss(config.loss),
        parameter_mask=parameter_mask,
        optim=config.optim,
        steps=config.train.steps,
        micro_tokens=config.train.micro_tokens,
        pad_id=text.pad_id,
        discount=discount,
        teachers=teachers,
        world=world,
        progress=progress,
        reduction=reckoning_of(config),
        recorder=_recorder(config, causal_lm(model), engine, world, write),
    )
    return learner, model


def _recorder(
    config: Config,
    causal: "torch.nn.Module",
    engine: "Engine",
    world: "World",
    write: "Write",
) -> "Recorder":
    from opd.checkpoint.tensors import open_checkpoint
    from opd.train.record import Unrecorded, WeightRecorder

    if not isinstance(config.record, WeightRecordConfig):
        return Unrecorded()
    still = config.train.scores in (Watched.fisher, Watched.first_gradient)
    adam = config.optim if isinstance(config.optim, AdamWConfig) and not still else None
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


def _confinement(
    config: MaskConfig, mask: "Mask | None", model: "torch.nn.Module"
) -> "ParameterMask":
    from opd.train.parameter_mask import SparseTraining, RestoredTraining, DenseTraining

    if mask is None:
        return DenseTraining(model)
    assert isinstance(config, FileMaskConfig | DiscoverMaskConfig)
    match config.training:
        case MaskTraining.compact:
            return SparseTraining(model, mask)
        case MaskTraining.restore:
            return RestoredTraining(model, mask)


def _training_engine(
    config: Config,
    student: "Student",
    optimizer: "torch.optim.Optimizer",
    parameter_mask: "ParameterMask",
    world: "World",
) -> "Engine":
    from opd.train.engine import DeepSpeedEngine, TorchEngine, merged_deepspeed

    if config.launch.engine == LaunchEngine.torch:
        return TorchEngine(
            student,
            optimizer,
            gradients=parameter_mask.gradients,
            precision=config.train.precision,
            clip=config.optim.clip,
            device=world.device,
        )
    merged = merged_deepspeed(
        config.launch.deepspeed,
        zero=config.zero,
        precision=config.train.precision,
        clip=config.optim.clip,
    )
    return DeepSpeedEngine(student, optimizer, config=merged, world=world)
