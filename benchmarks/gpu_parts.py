"""The measurements of benchmarks/gpu.py that need one process each, and the models that they use.

A child process runs one: python benchmarks/gpu_parts.py PART FOLDER DEVICE DTYPE SIZE RESULT. The
result is JSON.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd.types import FinishReason, Prompt, Rollout, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Shape of the models and amount of work. ``shape`` has the names of Qwen2Config."""

    shape: dict[str, Any]
    prompts: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    micro_batch: int
    loss_tokens: int
    chunk_mib: int

    @property
    def max_length(self) -> int:
        return self.prompt_tokens + self.new_tokens


SIZES = {
    "full": Size(
        shape={  # Qwen2.5-1.5B
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
        },
        prompts=64,
        prompt_tokens=128,
        new_tokens=512,
        steps=4,
        micro_batch=16_384,
        loss_tokens=8192,
        chunk_mib=256,
    ),
    "tiny": Size(
        shape={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 128,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
        },
        prompts=4,
        prompt_tokens=12,
        new_tokens=20,
        steps=3,
        micro_batch=256,
        loss_tokens=64,
        chunk_mib=1,
    ),
}


def make_models(folder: Path, size: Size) -> dict[str, float]:
    """Student and teacher of random weights in bfloat16, their tokenizer, and prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocab = size.shape["vocab_size"]
    words = models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    config = Qwen2Config(**size.shape, max_position_embeddings=4096, eos_token_id=1)
    parameters = 0
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        with _default_dtype(torch.bfloat16):
            model = Qwen2ForCausalLM(config)
        parameters = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="t0", eos_token="t1", pad_token="t0"
        ).save_pretrained(folder / name)
    random = np.random.default_rng(0)
    with (folder / "train.jsonl").open("w") as out:
        for _ in range(4 * size.prompts):
            ids = random.integers(2, vocab, size.prompt_tokens)
            out.write(json.dumps({"prompt": " ".join(f"t{i}" for i in ids), "answer": "t2"}) + "\n")
    embedding = vocab * size.shape["hidden_size"]
    return {"parameters": parameters, "embedding": embedding}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def recipe_text(folder: Path, size: Size, dtype: str, device: str) -> str:
    """A recipe for one rank that trains the student of ``folder`` with its teacher on a server."""
    precision = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
    on_gpu = device == "cuda"
    return f"""
defaults:
  - base
  - override teacher: server
  - override loss: reverse_kl
  - _self_
student:
  model: {folder}/student
teacher:
  model: {folder}/teacher
  dtype: {dtype}
  max_model_len: {size.max_length + 8}
  gpu_memory_utilization: 0.2
  kv_cache_memory_bytes: {64 << 20}
data:
  train: {folder}/train.jsonl
rollout:
  max_tokens: {size.new_tokens}
  gpu_memory_utilization: 0.25
  kv_cache_memory_bytes: {"null" if on_gpu else 64 << 20}
optim:
  lr: 1e-6
train:
  steps: {size.steps}
  prompts_per_step: {size.prompts}
  precision: {precision}
  max_tokens_per_micro_batch: {size.micro_batch}
  chunk_mib: {size.chunk_mib}
  gradient_checkpointing: {str(on_gpu).lower()}
sync:
  verify_every: 1
save:
  every: 0
zero: 1
launch:
  processes: 1
"""


def random_rollouts(size: Size) -> list[Rollout]:
    """Random tokens in the shape of a step's rollouts."""
    random = np.random.default_rng(1)
    vocab = size.shape["vocab_size"]

    def ids(count: int) -> np.ndarray:
        return random.integers(2, vocab, count).astype(np.int32)

    return [
        Rollout(
            prompt=Prompt(uid=str(i), token_ids=ids(size.prompt_tokens)),
            token_ids=ids(size.new_tokens),
            logps=np.zeros(size.new_tokens, np.float32),
            finish_reason=FinishReason.length,
            version=0,
        )
        for i in range(size.prompts)
    ]


def measure_teacher(folder: Path, device: str, dtype: str, size: Size) -> dict[str, Any]:
    """Scores of a teacher server, which spawns its engine, against those of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from opd.config.student import DType
    from opd.config.teacher import ServerTeacherConfig, TeacherServerConfig
    from opd.run.teacher_servers import running_teacher
    from opd.teacher.client import ServerTeacher
    from opd.teacher.vocabulary import read_vocabulary
    from opd.types import ScoreRequest

    model = str(folder / "teacher")
    config = TeacherServerConfig(
        model=model,
        dtype=DType(dtype),
        max_model_len=size.max_length + 8,
        gpu_memory_utilization=0.4,
        kv_cache_memory_bytes=64 << 20,
    )
    rollouts = random_rollouts(size)
    vocabulary = read_vocabulary(
        AutoTokenizer.from_pretrained(model), matrix_size=size.shape["vocab_size"]
    )
    log = folder / f"teacher_{dtype}.log"
    started = time.perf_counter()
    with running_teacher(config, log_path=log, wait_s=600) as server:
        start_s = time.perf_counter() - started
        found: dict[str, Any] = {"start_s": start_s}
        scores = None
        for name, request in (("sampled", ScoreRequest()), ("full", ScoreRequest(full=True))):
            client = ServerTeacher(
                server.url,
                ServerTeacherConfig(),
                request=request,
                student=vocabulary,
                token=server.token,
            )
            client.score(rollouts[:2])  # kernels are compiled
            seconds, scored = _timed(lambda client=client: client.score(rollouts), device)
            tokens = size.prompts * size.max_length
            found[f"{name}_tokens_per_s"] = tokens / seconds
            scores = scores or [s.logps for s in scored]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
    assert scores is not None
    return found | gaps([s for s in scores if s is not None], own_logps(network, rollouts))


def measure_engine(folder: Path, device: str, dtype: str, size: Size) -> dict[str, Any]:
    """An engine in this process: speed, memory awake and asleep, and the weights after a push."""
    from opd.assembly.rollout import EngineInputs, build_engine
    from opd.checkpoint.tensors import open_checkpoint
    from opd.data.tokenizer import read_tokenizer
    from opd.run.recipe import load_recipe
    from opd.tracking.console import SilentProgress
    from opd.train.weights import checkpoint_views, load_student
    from opd.world import join_world

    recipe = folder / f"engine_{dtype}.yaml"
    recipe.write_text(recipe_text(folder, size, dtype, device))
    config = load_recipe(recipe).config
    model = config.student.model
    stored = sum(t.numel * t.dtype.itemsize for t in open_checkpoint(model).values())
    free = Memory(device)
    inputs = EngineInputs(
        config=config,
        model=model,
        tokenizer=read_tokenizer(model),
        max_length=size.max_length + 8,
        world=join_world(),
        progress=SilentProgress(),
    )
    start_s, (engine, sync) = _timed(lambda: build_engine(inputs), device)
    prompts = [r.prompt for r in random_rollouts(size)]
    sampling = Sampling(max_tokens=size.new_tokens)
    engine.generate(prompts[:2], sampling)
    with free.watch() as awake:
        rollout_s, rollouts = _timed(lambda: engine.generate(prompts, sampling), device)
    asleep = free.used()
    student = load_student(model, config.student, dtype=getattr(torch, dtype)).to(device)
    before = own_logps(student, rollouts)
    found: dict[str, Any] = {
        "start_s": start_s,
        "tokens_per_s": sum(len(r.token_ids) for r in rollouts) / rollout_s,
        "checkpoint_bytes": stored,
        "used_awake_bytes": None if awake.peak is None else awake.peak,
        "used_asleep_bytes": asleep,
    } | {f"first_{name}": gap for name, gap in gaps([r.logps for r in rollouts], before).items()}
    _change(student)
    push_s, _ = _timed(lambda: sync.push(checkpoint_views(student).items(), 1), device)
    pushed = engine.generate(prompts, sampling)
    after = own_logps(student, pushed)
    moved = gaps(before, own_logps(student, rollouts))
    return found | {
        "push_s": push_s,
        "moved_mean": moved["gap_mean"],
        **gaps([r.logps for r in pushed], after),
    }


def measure_loss(folder: Path, device: str, dtype: str, size: Size) -> dict[str, Any]:
    """The chunked Jensen-Shannon divergence from hidden states, and Liger's fused one."""
    from opd.batch import Batch
    from opd.config.loss import DivergenceLossConfig
    from opd.head import HeadSpec, chunk_rows
    from opd.losses.divergence import Divergence
    from opd.train.chunked import chunked_loss
    from opd.types import DivergenceKind

    torch.manual_seed(0)
    width, vocab, tokens = size.shape["hidden_size"], size.shape["vocab_size"], size.loss_tokens
    kind = getattr(torch, dtype)

    def random(rows: int, std: float) -> torch.Tensor:
        return torch.empty(rows, width, device=device, dtype=kind).normal_(std=std)

    student_ND, teacher_ND = random(tokens, 1.0), random(tokens, 1.0)
    student_VD, teacher_VD = random(vocab, 0.05), random(vocab, 0.05)
    zeros_N = torch.zeros(tokens, dtype=torch.int64, device=device)
    batch = Batch(
        input_ids_BT=zeros_N[None],
        attention_mask_BT=zeros_N[None],
        positions_N=zeros_N,
        target_N=zeros_N,
        engine_logp_N=zeros_N.float(),
        teacher_hidden_ND=teacher_ND,
    )
    spec = HeadSpec(vocab_size=vocab)
    loss = Divergence(DivergenceLossConfig(kind=DivergenceKind.jsd, beta=0.5))
    chunk = chunk_rows(vocab, size.chunk_mib << 20)

    def chunked(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        out = chunked_loss(
            hidden_ND, weight_VD, batch, loss, spec, teacher_head_VD=teacher_VD, chunk=chunk
        )
        return out.total / tokens

    found = {"opd": _measure_loss(chunked, student_ND, student_VD, device)}
    fused = _liger(teacher_ND, teacher_VD, device)
    if isinstance(fused, str):
        return found | {"liger": fused}
    return found | {"liger": _measure_loss(fused, student_ND, student_VD, device)}


LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _liger(teacher_ND: torch.Tensor, teacher_VD: torch.Tensor, device: str) -> LossFunction | str:
    """Liger's fused loss, or why it cannot be measured."""
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD  # pyright: ignore
    except ImportError:
        return "not measured: liger-kernel is not installed (pip install liger-kernel)"
    if device != "cuda":
        return "not measured: its kernels need a GPU"
    fused = LigerFusedLinearJSD(jsd_beta=0.5)
    return lambda hidden_ND, weight_VD: fused(hidden_ND, weight_VD, teacher_ND, teacher_VD)


def _measure_loss(
    loss: LossFunction, hidden: torch.Tensor, weight: torch.Tensor, device: str
) -> dict[str, float | None]:
    """Milliseconds of forward and backward (the best of three), peak memory above inputs, the value."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(hidden, weight).backward()  # kernels are compiled, gradients are allocated
    best, value, peak = float("inf"), 0.0, None
    for _ in range(3):
        hidden.grad, weight.grad = None, None
        before = 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()

        def run() -> float:
            total = loss(hidden, weight)
            total.backward()
            return float(total.detach())

        seconds, value = _timed(run, device)
        best = min(best, seconds)
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() - before
    return {"ms": 1000 * best, "peak_bytes": peak, "value": value}


class Memory:
    """Bytes in use on the device; None on a CPU, where sleep does nothing."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.peak: int | None = None

    def used(self) -> int | None:
        if not self._cuda:
            return None
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free

    @contextmanager
    def watch(self) -> Iterator["Memory"]:
        """Keep the peak while inside."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.02):
                free, total = torch.cuda.mem_get_info()
                self.peak = max(self.peak or 0, total - free)

        thread = threading.Thread(target=look, daemon=True)
        if self._cuda:
            thread.start()
        try:
            yield self
        finally:
            done.set()
            if self._cuda:
                thread.join()


@torch.inference_mode()
def own_logps(model: torch.nn.Module, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
    """Log-probs of the rollouts' tokens by transformers, one rollout at a time, softmax in float32."""
    device = next(model.parameters()).device
    logps = []
    for rollout in rollouts:
        ids = torch.from_numpy(rollout.sequence.astype(np.int64)).to(device)
        first = len(rollout.prompt.token_ids) - 1
        logits_TV = model(ids[None]).logits[0, first:-1].float()
        targets_T = ids[first + 1 :, None]
        logps.append(torch.log_softmax(logits_TV, -1).gather(1, targets_T)[:, 0].cpu().numpy())
    return logps


def gaps(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean and largest |difference| in nats."""
    gap = np.concatenate([np.abs(a - b) for a, b in zip(one, other, strict=True)])
    return {"gap_mean": float(gap.mean()), "gap_max": float(gap.max())}


@torch.no_grad()
def _change(model: torch.nn.Module) -> None:
    """Move every matrix by a tenth of its spread, as no single step would."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.1)


def _timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    started = time.perf_counter()
    found = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, found


PARTS = {"teacher": measure_teacher, "engine": measure_engine, "loss": measure_loss}


def main(part: str, folder: str, device: str, dtype: str, size: str, result: str) -> None:
    found = PARTS[part](Path(folder), device, dtype, SIZES[size])
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
