"""What training a mask saves: bytes between steps, bytes on the wire, seconds per step, and its costs.

The same student, batches and optimizer, all weights (dense) and a random mask (compact) in turns, on
two DeepSpeed ranks of this machine, each in processes of its own. "kept" is everything a rank holds
between steps besides the model's own weights and the mask: optimizer state, masters, gradients,
buffers (every live torch storage is counted). "wire" is what the rank passes to collectives in one
step. "gradients at once" is the largest sum of dense weight gradients alive at the same time in a
backward pass, as a share of the largest single one.

    python benchmarks/masked_training.py --zero 1 --density 0.175 --out masked_training.json
"""

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

WAYS = ("dense", "compact")
MIB = 1 << 20
MARK = "figures: "
SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}


def measure(way: str, args: argparse.Namespace) -> dict[str, float]:
    """One rank of one way: figures per rank."""
    import torch
    import torch.distributed as dist

    wire = _counted_collectives(dist)
    from transformers import LlamaConfig, LlamaForCausalLM

    from opd.config.launch import merged_deepspeed
    from opd.config.optim import AdamWConfig, SGDConfig
    from opd.config.train import Precision, TrainConfig
    from opd.head import HeadSpec
    from opd.losses.divergence import Divergence
    from opd.mask.file import Origin
    from opd.mask.mask import Mask
    from opd.tracking.console import SilentProgress
    from opd.train.compact import MaskedWeight
    from opd.train.deepspeed_engine import DeepSpeedEngine
    from opd.train.learner import StudentLearner
    from opd.train.optimizers import LearningRate, build_optimizer
    from opd.train.parameter_mask import DenseTraining, SparseTraining
    from opd.train.student import Student
    from opd.train.weights import named_weights
    from opd.world import join_world

    torch.manual_seed(0)
    world = join_world()
    precision = Precision(args.precision)
    model: Any = LlamaForCausalLM(
        LlamaConfig(tie_word_embeddings=True, max_position_embeddings=512, **SIZES[args.size])
    )
    parameter_mask: Any = DenseTraining(model)
    if way == "compact":
        shapes = {name: tuple(weight.shape) for name, weight in named_weights(model)}
        indices = {
            name: (torch.rand(torch.Size(shape).numel()) < args.density).nonzero()[:, 0].int()
            for name, shape in shapes.items()
        }
        origin = Origin(rule="random", base="", model=args.size)
        mask = Mask(indices=indices, shapes=shapes, origin=origin)
        parameter_mask = SparseTraining(model, mask)
        del indices, mask
    vocab = model.config.vocab_size
    student = Student(
        model,
        spec=HeadSpec(vocab_size=vocab),
        temperature=1.0,
        chunk_bytes=64 * MIB,
        teacher_head=lambda name: head,
    ).to(world.device)
    optim = AdamWConfig(lr=1e-5) if args.optim == "adamw" else SGDConfig(lr=1e-3)
    optimizer = build_optimizer(student, optim)
    config = merged_deepspeed(None, zero=args.zero, precision=precision, max_grad_norm=1.0)
    engine = DeepSpeedEngine(student, optimizer, config=config, world=world)
    head = torch.randn(vocab, model.config.hidden_size, device=world.device) * 0.05
    learner = StudentLearner(
        engine,
        model,
        Divergence(),
        TrainConfig(max_tokens_per_micro_batch=args.tokens // args.micro),
        parameter_mask=parameter_mask,
        learning_rate=LearningRate(optim, steps=args.steps, warmup_steps=optim.warmup_steps),
        pad_id=0,
        discount=0.0,
        world=world,
        progress=SilentProgress(),
    )
    batch = _batch(args.tokens, vocab, model.config.hidden_size)
    learner.step(batch)
    together = _dense_gradients(model, MaskedWeight) if way == "compact" else None
    wire.clear()
    seconds = []
    for _ in range(args.steps):
        world.barrier()
        start = time.perf_counter()
        learner.step(batch)
        seconds.append(time.perf_counter() - start)
    own = [*model.parameters(), *model.buffers(), head]
    figures = {
        "kept_mib": _live_bytes(exclude=own) / MIB,
        "wire_mib": sum(wire) / args.steps / MIB,
        "seconds": statistics.median(seconds),
    }
    if together is not None:
        figures["gradients_at_once"] = together["most"] / together["largest"]
    world.close()
    return figures


def _batch(tokens: int, vocab: int, width: int) -> list[Any]:
    import numpy as np

    from opd.types import FinishReason, Prompt, Rollout, ScoredRollout

    draw = np.random.default_rng(0)
    rows = []
    for row in range(max(1, tokens // 64)):
        prompt = Prompt(uid=str(row), token_ids=draw.integers(3, vocab, 16).astype(np.int32))
        rollout = Rollout(
            prompt=prompt,
            token_ids=draw.integers(3, vocab, 48).astype(np.int32),
            logps=np.zeros(48, np.float32),
            finish_reason=FinishReason.length,
            version=0,
        )
        hidden = draw.normal(size=(48, width)).astype(np.float32)
        rows.append(ScoredRollout(rollout=rollout, hidden=hidden))
    return rows


def _counted_collectives(dist: Any) -> list[float]:
    """Bytes that this rank passes to each collective from now on; call it before DeepSpeed is loaded."""
    counted: list[float] = []

    def counting(call: Any, which: int) -> Any:
        def counted_call(*arguments: Any, **keywords: Any) -> Any:
            given = [*arguments, *keywords.values()]
            tensor = given[which] if len(given) > which else given[0]
            tensors = tensor if isinstance(tensor, list | tuple) else [tensor]
            counted.append(sum(t.numel() * t.element_size() for t in tensors))
            return call(*arguments, **keywords)

        return counted_call

    for name, which in {
        "all_reduce": 0,
        "reduce": 0,
        "broadcast": 0,
        "all_gather": 1,
        "all_gather_into_tensor": 1,
        "reduce_scatter_tensor": 1,
    }.items():
        setattr(dist, name, counting(getattr(dist, name), which))
    return counted


def _dense_gradients(model: Any, masked_weight: type) -> dict[str, float]:
    """Watch the gradients that reach masked weights: the largest, and the most alive at once."""
    found: dict[str, float] = {"largest": 0.0, "most": 0.0}
    alive: list[Any] = []

    def seen(grad: Any) -> None:
        alive[:] = [each for each in alive if each() is not None]
        alive.append(weakref.ref(grad))
        tensors = [t for each in alive if (t := each()) is not None]
        held = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors}
        found["largest"] = max(found["largest"], float(grad.nbytes))
        found["most"] = max(found["most"], float(sum(held.values())))

    for module in model.modules():
        if isinstance(module, masked_weight):
            module.register_full_backward_pre_hook(lambda _, grads: seen(grads[0]))
    return found


def _live_bytes(exclude: list[Any]) -> float:
    import torch

    gc.collect()
    mine = {t.untyped_storage().data_ptr() for t in exclude}
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in mine:
                found[storage.data_ptr()] = storage.nbytes()
    return float(sum(found.values()))


def run_ways(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Both ways in turns; medians over turns, the slower rank's time."""
    gathered: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.turns):
        for way in WAYS:
            gathered[way].append(_two_ranks(way, args))
            print(way, {k: round(v, 3) for k, v in gathered[way][-1].items()}, flush=True)
    return {
        way: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        for way, turns in gathered.items()
    }


def _two_ranks(way: str, args: argparse.Namespace) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [f"--{k}={v}" for k, v in vars(args).items() if k not in ("out", "way")]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *flags, f"--way={way}"],
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(args.ranks),
                "LOCAL_WORLD_SIZE": str(args.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.ranks)),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(args.ranks)
    ]
    outputs = [p.communicate()[0] for p in started]
    lines = [[o for o in output.splitlines() if o.startswith(MARK)] for output in outputs]
    if not all(lines):
        sys.exit("\n".join(output[-2000:] for output in outputs))
    ranks = [json.loads(line[-1].removeprefix(MARK)) for line in lines]
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--zero", type=int, choices=range(4), default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--optim", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--density", type=float, default=0.175)
    parser.add_argument("--tokens", type=int, default=1024, help="padded tokens of a rank's step")
    parser.add_argument("--micro", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(f"\n{MARK}{json.dumps(measure(args.way, args))}", flush=True)
        return
    found = run_ways(args)
    dense, compact = (found[way] for way in WAYS)
    print(
        f"\n{args.size}, ZeRO {args.zero}, {args.precision}, {args.optim}, density {args.density}"
    )
    for key in dense:
        ratio = compact[key] / dense[key]
        print(f"{key:10} dense {dense[key]:10.2f}  compact {compact[key]:10.2f}  ratio {ratio:.3f}")
    print(
        f"largest sum of dense gradients at once: {compact['gradients_at_once']:.2f} x the largest"
    )
    if args.out:
        Path(args.out).write_text(json.dumps({"settings": vars(args), **found}, indent=1))


if __name__ == "__main__":
    main()
