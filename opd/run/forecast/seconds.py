"""Seconds of a step on a named GPU, and the bytes that it sends, from stated rates."""

from collections.abc import Mapping
from dataclasses import dataclass

from opd.config.adapter import LoraConfig
from opd.config.rollout import DatasetRolloutConfig, ServerRolloutConfig
from opd.config.schema import Config
from opd.run.forecast import gpus
from opd.run.forecast.cards import Forecast
from opd.run.forecast.engines import cache_bytes, engine_weights
from opd.run.forecast.gpus import Gpu
from opd.run.forecast.rank import Models, Phase
from opd.run.model_facts import ModelFacts
from opd.run.placement import Placement
from opd.teacher.wire import Want

GB, TERA = 1e9, 1e12
MAX_SEQUENCES = 256
"""vLLM's max_num_seqs: sequences that one engine decodes at once."""
LOSS_PASSES, SUPPORT_PASSES = 46, 30
"""Passes over float32 [C, V] of the head's softmax, the loss and their gradients: whole distribution, or a
support or sampled tokens."""
STEP_BYTES = 28
"""Read and written for each number that the optimizer steps: gradient, master, two moments, weight."""
CHANGED_SHARE, CHANGED_BYTES = 0.037, 6
"""Of bf16 weights that a step changes at a learning rate of 1e-6 (0.8 to 3.7 %), and bytes for each."""
KEPT_BYTES = 2.6
"""For each changed coordinate of a mask that the receiver knows, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSeconds:
    """Seconds of a phase by what takes them."""

    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.parts, key=lambda name: self.parts[name], default="")


def step_seconds(
    config: Config, found: Forecast, placement: Placement, models: Models
) -> dict[Phase, PhaseSeconds]:
    """A step's phases, one after another; empty without a GPU of the table."""
    if not placement.cards.count or not placement.cards.name:
        return {}
    _, gpu = gpus.find_gpu(placement.cards.name)
    teacher = models.scoring(config)
    spans = {
        Phase.rollout: _rollout(config, found, placement, models.student, gpu),
        Phase.score: _score(found, placement, teacher, gpu),
        Phase.learn: _learn(config, found, models.student, teacher, gpu),
        Phase.sync: _sync(config, found, models.student, gpu),
    }
    return {phase: span for phase, span in spans.items() if span.parts}


def _rollout(
    config: Config, found: Forecast, placement: Placement, student: ModelFacts, gpu: Gpu
) -> PhaseSeconds:
    """Decoding: for each token the weights and half of the caches are read, and a step's own time.

    Sequences that do not fit into the cache wait for the next wave.
    """
    if isinstance(config.rollout, DatasetRolloutConfig) or config.rollout.on_policy == 0:
        return PhaseSeconds(parts={})
    work = found.learner.work
    sequences = work.sequences
    if isinstance(config.rollout, ServerRolloutConfig):
        engines = len(placement.rollout_servers) or len(config.rollout.urls) or 1
        sequences = -(-sequences * len(placement.ranks) // engines)
    room = found.cache_tokens // work.width if found.cache_tokens else MAX_SEQUENCES
    together = max(1, min(sequences, MAX_SEQUENCES, room))
    steps = config.rollout.max_tokens * -(-sequences // together)
    element = engine_weights(config, student) // student.parameters
    read = engine_weights(config, student)
    read += together * work.width / 2 * cache_bytes(student, element)
    rate = gpu.hbm * GB * gpus.HBM_SHARE
    prompts = sequences * (work.width - config.rollout.max_tokens)
    return PhaseSeconds(
        parts={
            "prefill": 2 * student.linear * prompts / _matmul(gpu),
            "reading weights and cache": steps * read / rate,
            "steps of the engine": steps * gpus.DECODE_STEP_S,
        }
    )


def _score(
    found: Forecast, placement: Placement, teacher: ModelFacts | None, gpu: Gpu
) -> PhaseSeconds:
    """A forward pass over all tokens, the float32 head, and hidden states on their way to the ranks."""
    if found.transport is None or teacher is None:
        return PhaseSeconds(parts={})
    work, servers = found.learner.work, placement.teachers
    ranks = len(placement.ranks)
    share = ranks / len(servers) if servers else 1
    cards = len(servers[0].cards) or 1 if servers else 1
    tokens = work.sequences * work.width * share
    targets = work.sequences * (work.targets / work.rows) * share
    parts = {
        "teacher's layers": 2 * teacher.linear * tokens / (_matmul(gpu) * cards),
        "teacher's head": 2 * targets * teacher.head / _fp32(gpu),
    }
    if servers:
        sent = hidden_state_bytes(int(tokens), teacher)
        parts["hidden states"] = sent / gpus.HIDDEN_BYTES_PER_S
    return PhaseSeconds(parts=parts)


def hidden_state_bytes(tokens: int, teacher: ModelFacts) -> int:
    """4 D for each token: what leaves a teacher's engine, in float32 whatever is sent."""
    return 4 * tokens * teacher.hidden


def _learn(
    config: Config, found: Forecast, student: ModelFacts, teacher: ModelFacts | None, gpu: Gpu
) -> PhaseSeconds:
    """6 P operations a token (4 with adapters, 2 more with checkpointing), head, loss, optimizer."""
    setup, work = found.learner, found.learner.work
    passes = (4 if isinstance(config.adapter, LoraConfig) else 6) + 2 * setup.checkpointing
    targets = work.sequences * work.targets / work.rows
    vocab = student.vocab
    full = found.transport is not None and found.transport.want != Want.logps
    hbm = gpu.hbm * GB * gpus.HBM_SHARE
    chunk = max(1, setup.chunk_bytes // (4 * vocab))
    parts = {
        "layers": passes * student.linear * work.sequences * work.width / _matmul(gpu),
        "head": 6 * targets * student.head / _matmul(gpu),
        "loss": (LOSS_PASSES if full else SUPPORT_PASSES) * 4 * targets * vocab / hbm,
        "head's gradient": 12 * student.head * targets / chunk / hbm if setup.head_trained else 0.0,
        "optimizer": STEP_BYTES * setup.trained * setup.share / hbm,
    }
    if full and teacher is not None:
        parts["teacher's head"] = 2 * targets * vocab * teacher.hidden / _fp32(gpu)
    if setup.ranks > 1:
        sent = 4 * setup.trained * (setup.ranks - 1) / setup.ranks
        parts["gradients and weights between cards"] = sent / (gpu.link * GB * gpus.LINK_SHARE)
    return PhaseSeconds(parts=parts)


def _sync(config: Config, found: Forecast, student: ModelFacts, gpu: Gpu) -> PhaseSeconds:
    """Into an engine of the same process: three passes over the weights. To servers: all of them by HTTP."""
    if isinstance(config.rollout, DatasetRolloutConfig):
        return PhaseSeconds(parts={})
    sent = sync_bytes(config, found, student)
    if isinstance(config.rollout, ServerRolloutConfig):
        return PhaseSeconds(
            parts={"weights to servers": sent["a snapshot"] / gpus.PUSH_BYTES_PER_S}
        )
    return PhaseSeconds(parts={"weights": 3 * sent["weights"] / (gpu.hbm * GB * gpus.HBM_SHARE)})


def sync_bytes(config: Config, found: Forecast, student: ModelFacts) -> dict[str, int]:
    """Bytes of a push: the learner's weights, or to servers a snapshot and what changes at most."""
    if isinstance(config.rollout, DatasetRolloutConfig):
        return {}
    if not isinstance(config.rollout, ServerRolloutConfig):
        return {"weights": found.learner.element * student.parameters}
    compact = found.learner.compact
    patch = KEPT_BYTES * compact if compact else CHANGED_SHARE * CHANGED_BYTES * student.parameters
    return {"a snapshot": engine_weights(config, student), "a patch, at most": int(patch)}


def _matmul(gpu: Gpu) -> float:
    return gpu.bf16 * TERA * gpus.MATMUL_SHARE


def _fp32(gpu: Gpu) -> float:
    return gpu.fp32 * TERA * gpus.FP32_SHARE
