"""Run by test_train_engines.py in every rank: trains on fixed scores, leaves weights and metrics.

    python train_ranks.py OUT CASE [CASE ...]      CASE = zero/precision/optimizer/micro_tokens,
                                                   /resumed: saved and loaded before the last step

``zero`` is 0..3, or torch for the engine without DeepSpeed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from opd.config.launch import merged_deepspeed
from opd.config.optim import AdamWConfig, OptimConfig, SGDConfig
from opd.config.train import Precision
from opd.head import HeadSpec
from opd.losses.divergence import Divergence
from opd.tracking.console import SilentProgress
from opd.train.deepspeed_engine import DeepSpeedEngine
from opd.train.learner import StudentLearner
from opd.train.optimizers import build_optimizer
from opd.train.parameter_mask import DenseTraining
from opd.train.student import Student
from opd.train.torch_engine import TorchEngine
from opd.train.weights import load_student
from opd.types import DivergenceKind, FinishReason, Prompt, Rollout, ScoredRollout
from opd.world import World, join_world

MODEL = Path(__file__).parents[2] / "recipes" / "quickstart" / "student"
STEPS, ROWS = 3, 8


def scores(step: int, vocab: int) -> list[ScoredRollout]:
    """The global batch of a step: completions of uneven length, a random full teacher."""
    draw = np.random.default_rng(step)
    batch = []
    for row in range(ROWS):
        length = int(draw.integers(2, 12))
        logits = torch.from_numpy(draw.normal(size=(length, vocab)) * 2)
        prompt = Prompt(uid=f"{step}.{row}", token_ids=draw.integers(3, vocab, 5).astype(np.int32))
        rollout = Rollout(
            prompt=prompt,
            token_ids=draw.integers(3, vocab, length).astype(np.int32),
            logps=np.zeros(length, np.float32),
            finish_reason=FinishReason.length,
            version=step,
        )
        full = torch.log_softmax(logits, -1).float().numpy()
        batch.append(ScoredRollout(rollout=rollout, full_logps=full))
    return batch


def optim_of(name: str) -> OptimConfig:
    if name == "adamw":
        return AdamWConfig(lr=3e-3, weight_decay=0.1, clip=1.0, warmup_steps=2)
    return SGDConfig(lr=0.1, weight_decay=0.1, clip=1.0, momentum=0.9)


def learner_of(case: str, world: World) -> tuple[StudentLearner, int]:
    zero, precision_name, optimizer_name, micro_tokens = case.split("/")
    precision, optim = Precision(precision_name), optim_of(optimizer_name)
    dtype = torch.bfloat16 if precision == Precision.pure_bf16 else torch.float32
    model = load_student(str(MODEL), dtype=dtype, attention="sdpa", trust_remote_code=False)
    vocab = model.config.vocab_size
    student = Student(
        model,
        spec=HeadSpec(vocab_size=vocab),
        temperature=1.0,
        chunk_bytes=7 * 4 * vocab,
        teacher_head=lambda name: torch.empty(0),
    )
    optimizer = build_optimizer(student, optim)
    everything = DenseTraining(student)
    if zero == "torch":
        engine = TorchEngine(
            student,
            optimizer,
            gradients=everything.gradients,
            precision=precision,
            clip=optim.clip,
            device=world.device,
        )
    else:
        config = merged_deepspeed(None, zero=int(zero), precision=precision, clip=optim.clip)
        engine = DeepSpeedEngine(student, optimizer, config=config, world=world)
    learner = StudentLearner(
        engine,
        model,
        Divergence(kind=DivergenceKind.reverse_kl),
        parameter_mask=everything,
        optim=optim,
        steps=STEPS,
        micro_tokens=int(micro_tokens),
        pad_id=0,
        discount=0.0,
        world=world,
        progress=SilentProgress(),
    )
    return learner, vocab


def main(out: Path, cases: list[str]) -> None:
    from accelerate.state import AcceleratorState

    world = join_world()
    for case in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        learner, vocab = learner_of(case.removesuffix("/resumed"), world)
        reports = []
        for step in range(STEPS):
            if step == STEPS - 1 and case.endswith("/resumed"):
                learner = gone_on(learner, case.removesuffix("/resumed"), out, world)
            share = scores(step, vocab)[world.rank :: world.size]
            reports.append(learner.step(share).metrics)
        weights = {name: tensor.float().clone() for name, tensor in learner.weights()}
        if world.is_main:
            name = case.replace("/", "_")
            save_file(weights, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(reports))


def gone_on(learner: StudentLearner, case: str, out: Path, world: World) -> StudentLearner:
    """A fresh learner that loads what this one saved."""
    from accelerate.state import AcceleratorState

    folder = out / f"checkpoint_{case.replace('/', '_')}"
    folder.mkdir(exist_ok=True)
    world.barrier()
    learner.save(str(folder))
    world.barrier()
    AcceleratorState._reset_state(reset_partial_state=True)
    fresh, _ = learner_of(case, world)
    fresh.load(str(folder))
    assert fresh.version == learner.version
    return fresh


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
