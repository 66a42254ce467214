"""The student's model, its adapters, and which of its weights are trained."""

from collections.abc import Sequence
from pathlib import Path

import torch

from opd.config.adapter import LoraConfig
from opd.config.launch import LaunchEngine, run_deepspeed
from opd.config.mask import DiscoverMaskConfig, FileMaskConfig, MaskTraining, active_mask
from opd.config.schema import Config
from opd.config.train import Precision
from opd.mask.file import RUN_MASK
from opd.mask.mask import Mask
from opd.model_head import head_spec
from opd.reference import OwnForward, bf16_rounding
from opd.train.float32 import float32_layers
from opd.train.loading import load_for_training
from opd.train.parameter_mask import (
    DenseTraining,
    ParameterMask,
    RestoredTraining,
    SparseTraining,
)
from opd.train.routers import keep_float32_routers
from opd.train.student import causal_lm
from opd.train.weights import disable_dropout, load_student, with_lora
from opd.world import World


def read_run_mask(config: Config, folder: Path) -> Mask | None:
    """The mask that was written into the run folder before training; None trains every weight."""
    if active_mask(config) is None:
        return None
    return Mask.read(folder / RUN_MASK)


def build_model(
    config: Config, mask: Mask | None, world: World, probe: Sequence[int]
) -> tuple[torch.nn.Module, ParameterMask, OwnForward]:
    """The transformers (or peft) model, which of its weights are trained, and its own forward pass.

    The last is that of the model as it was loaded, on the token ids ``probe``.
    """
    model = _load(config, mask, world).to(world.device)
    with float32_layers(model):
        own = OwnForward.of(model, probe, dtype=torch.float32)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
    if isinstance(config.adapter, LoraConfig):
        model = with_lora(model, config.adapter)
        if config.launch.engine == LaunchEngine.deepspeed:
            _cast_trained(model, _dtype(config))
    if not config.train.dropout:
        disable_dropout(model)
    if config.train.precision == Precision.bf16:
        keep_float32_routers(causal_lm(model))
    return model, _parameter_mask(config, mask, model), own


def _load(config: Config, mask: Mask | None, world: World) -> torch.nn.Module:
    """The model in the dtype that the engine trains; partitioned over ranks in stage 3 without a mask.

    A mask needs whole weights, of which it keeps coordinates.
    """
    deepspeed = config.launch.engine == LaunchEngine.deepspeed
    partition = deepspeed and config.zero == 3 and world.size > 1 and mask is None
    if config.train.precision == Precision.pure_bf16 and not partition:
        return load_student(config.student.model, config.student, dtype=torch.bfloat16)
    return load_for_training(
        config.student.model,
        config.student,
        dtype=_dtype(config),
        partition=run_deepspeed(config) if partition else None,
    )


def _dtype(config: Config) -> torch.dtype:
    """What weights are held in: DeepSpeed makes masters from bf16 weights, torch computes with masters."""
    match config.train.precision:
        case Precision.fp32:
            return torch.float32
        case Precision.pure_bf16:
            return torch.bfloat16
        case Precision.bf16:
            of_deepspeed = config.launch.engine == LaunchEngine.deepspeed
            return torch.bfloat16 if of_deepspeed else torch.float32


def _cast_trained(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """New adapters in ``dtype``, as DeepSpeed casts them in a model that is not partitioned."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def measure_rounding(config: Config, model: torch.nn.Module, ids: Sequence[int]) -> float | None:
    """How far bf16 layers are from float32 ones in nats, on some token ids; None in other precisions."""
    if config.train.precision != Precision.bf16:
        return None
    causal = causal_lm(model)
    spec = head_spec(causal.config, trust_remote_code=config.student.trust_remote_code)
    with float32_layers(causal, causal.get_output_embeddings().parameters()):
        return bf16_rounding(causal, ids, spec)


def _parameter_mask(config: Config, mask: Mask | None, model: torch.nn.Module) -> ParameterMask:
    if mask is None:
        return DenseTraining(model)
    assert isinstance(config.mask, FileMaskConfig | DiscoverMaskConfig)
    match config.mask.training:
        case MaskTraining.compact:
            return SparseTraining(model, mask)
        case MaskTraining.restore:
            return RestoredTraining(model, mask)
