"""Run by test_masked_training.py in every rank: trains a mask on fixed scores, leaves what it holds.

    python mask_ranks.py OUT CASE [CASE ...]      CASE = training/zero/precision/optimizer/clip/steps,
                                                  /resumed: saved and loaded in the middle

``training`` is compact or restore, or the name of a score: then everything is trained and the case
leaves the scores. ``zero`` is 0..3, or torch for the engine without DeepSpeed. Each case leaves the
weights and the reports of its steps.
"""

import json
import sys
from pathlib import Path

import torch
from opd.config.training import Watched
from safetensors.torch import save_file
from torch import nn
from train_ranks import scores
from transformers import Qwen2Config, Qwen2ForCausalLM

from opd.checkpoint.tensors import Stored
from opd.config.launch import merged_deepspeed
from opd.config.optim import AdamWConfig, OptimConfig, SGDConfig
from opd.config.train import Precision
from opd.head import HeadSpec
from opd.losses.divergence import Divergence
from opd.mask.file import Origin
from opd.mask.mask import Mask
from opd.tracking.console import SilentProgress
from opd.train.deepspeed_engine import DeepSpeedEngine
from opd.train.learner import StudentLearner
from opd.train.mask_scores import SquaredGradients
from opd.train.optimizers import build_optimizer
from opd.train.parameter_mask import DenseTraining, RestoredTraining, SparseTraining
from opd.train.record import WeightRecorder, Write
from opd.train.student import Student
from opd.train.torch_engine import TorchEngine
from opd.train.weights import named_weights
from opd.types import DivergenceKind
from opd.world import World, join_world

VOCAB, DENSITY, MICRO_TOKENS = 61, 0.2, 40
EMPTY = "model.layers.0.self_attn.o_proj.weight"
FULL = "model.layers.1.mlp.up_proj.weight"


def tiny() -> Qwen2ForCausalLM:
    """Tied head, biases on queries, keys and values, grouped heads; weights on the bf16 grid."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
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


def mask_of(model: nn.Module) -> Mask:
    """A fifth of every tensor, 1-D ones included; one tensor kept whole and one not at all."""
    draw = torch.Generator().manual_seed(1)
    indices = {}
    for name, weight in named_weights(model):
        share = {EMPTY: 0.0, FULL: 1.0}.get(name, DENSITY)
        order = torch.randperm(weight.numel(), generator=draw)
        indices[name] = order[: round(share * weight.numel())].sort().values.int()
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(model)}
    return Mask(indices=indices, shapes=shapes, origin=Origin(rule="test", base="", model="tiny"))


def base() -> dict[str, Stored]:
    """The weights that training starts from, as a checkpoint gives them."""
    weights = {name: weight.detach() for name, weight in named_weights(tiny())}
    return {
        name: Stored(shape=tuple(w.shape), dtype=w.dtype, read=lambda w=w: w)
        for name, w in weights.items()
    }


def optim_of(name: str, clip: float) -> OptimConfig:
    if name == "adamw":
        return AdamWConfig(lr=3e-3, weight_decay=0.1, clip=clip, warmup_steps=2)
    return SGDConfig(lr=0.03, weight_decay=0.1, clip=clip, momentum=0.9)


def learner_of(case: str, world: World, write: Write | None = None) -> StudentLearner:
    """The learner of a case; ``write`` takes what is recorded of its weights, every second step."""
    training, zero, precision_name, optimizer_name, clip, steps = case.split("/")
    precision, optim = Precision(precision_name), optim_of(optimizer_name, float(clip))
    model = tiny()
    if precision == Precision.pure_bf16:
        model = model.bfloat16()
    match training:
        case "compact":
            confined = SparseTraining(model, mask_of(model))
        case "restore":
            confined = RestoredTraining(model, mask_of(model))
        case _:
            confined = DenseTraining(model)
    student = Student(
        model,
        spec=HeadSpec(vocab_size=VOCAB),
        temperature=1.0,
        chunk_bytes=7 * 4 * VOCAB,
        teacher_head=lambda name: torch.empty(0),
    )
    moves_nothing = training in (Watched.fisher, Watched.first_gradient)
    optimizer = (
        SquaredGradients(student.parameters()) if moves_nothing else build_optimizer(student, optim)
    )
    if zero == "torch":
        engine = TorchEngine(
            student,
            optimizer,
            gradients=confined.gradients,
            precision=precision,
            clip=optim.clip,
            device=world.device,
        )
    else:
        config = merged_deepspeed(None, zero=int(zero), precision=precision, clip=optim.clip)
        # every shard is really sharded
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        engine = DeepSpeedEngine(student, optimizer, config=config, world=world)
    recorder = None
    if write is not None:
        adam = optim if isinstance(optim, AdamWConfig) else None
        recorder = WeightRecorder(
            model, engine, base(), every=2, steps=int(steps), adam=adam, world=world, write=write
        )
    return StudentLearner(
        engine,
        model,
        Divergence(kind=DivergenceKind.reverse_kl),
        parameter_mask=confined,
        optim=optim,
        steps=int(steps),
        micro_tokens=MICRO_TOKENS,
        pad_id=0,
        discount=0.0,
        world=world,
        progress=SilentProgress(),
        recorder=recorder,
    )


def main(out: Path, cases: list[str]) -> None:
    from accelerate.state import AcceleratorState

    world = join_world()
    for case in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        plain = case.removesuffix("/resumed")
        steps = int(plain.split("/")[-1])
        learner = learner_of(plain, world)
        reports = []
        for step in range(steps):
            if step == steps // 2 and case.endswith("/resumed"):
                folder = out / f"checkpoint_{plain.replace('/', '_')}"
                folder.mkdir(exist_ok=True)
                world.barrier()
                learner.save(str(folder))
                world.barrier()
                AcceleratorState._reset_state(reset_partial_state=True)
                learner = learner_of(plain, world)
                learner.load(str(folder))
            share = scores(step, VOCAB)[world.rank :: world.size]
            reports.append(learner.step(share).metrics)
        training = plain.split("/")[0]
        left = (
            learner.weights()
            if training in ("compact", "restore")
            else learner.scores(Watched(training), base())
        )
        weights = {name: tensor.clone() for name, tensor in left}
        if world.is_main:
            name = case.replace("/", "_")
            save_file(weights, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
