"""Bytes of what generates and of what scores, and what they send."""

from dataclasses import dataclass

from opd.config.adapter import LoraConfig
from opd.config.loss import LossConfig
from opd.config.rollout import (
    RolloutConfig,
    TransformersRolloutConfig,
    VllmRolloutConfig,
    engine_dtype,
    training_sampling,
)
from opd.config.schema import Config
from opd.config.student import DType
from opd.config.teacher import (
    LocalTeacherConfig,
    PoolTeacherConfig,
    SelfTeacher,
    SelfTeacherConfig,
    ServerTeacherConfig,
    TeacherBackend,
    TeacherConfig,
    TeacherEngineConfig,
    has_teacher,
)
from opd.head import chunk_rows
from opd.rollout.vllm import CPU_CACHE_BYTES
from opd.run.forecast.gpus import ENGINE_WORKSPACE_BYTES
from opd.run.forecast.learner import Bytes
from opd.run.model_facts import ModelFacts
from opd.teacher.connect import pool_models
from opd.teacher.scoring import CHUNK_BYTES
from opd.teacher.transport import WIDTHS, Transport, transports
from opd.teacher.wire import Want
from opd.types import ScoreRequest, TeacherInfo

SCORE_BLOCKS = 4
"""[C, V] blocks of a teacher's head at once: logits, log-probs, two temporaries."""
HEAD_BYTES = 4
"""Of a number of the head that turns a teacher's hidden states into scores: float32."""


def placed_models(config: Config) -> list[str]:
    """The teachers whose servers a run starts, each once."""
    match config.teacher:
        case ServerTeacherConfig(url=None, model=str(model)):
            return [model]
        case PoolTeacherConfig(members=members):
            return pool_models(members)
    return []


def scoring_model(config: Config) -> str | None:
    """The model whose sizes the scores have: the teacher, the first member of a pool, or the student."""
    match config.teacher:
        case PoolTeacherConfig():
            models = placed_models(config)
            return models[0] if models else config.student.model
        case SelfTeacherConfig():
            return config.student.model
    if not has_teacher(config):
        return None
    return config.teacher.model or config.student.model


def weight_bytes(config: TeacherConfig, facts: ModelFacts, *, cuda: bool) -> int:
    """Bytes of a teacher's weight: vLLM computes float32 checkpoints in 16 bits on CUDA."""
    if config.dtype != DType.auto:
        return WIDTHS[config.dtype]
    is_vllm = isinstance(config, TeacherEngineConfig) and config.backend == TeacherBackend.vllm
    return 2 if is_vllm and cuda else (4 if facts.dtype == "float32" else 2)


def cache_bytes(facts: ModelFacts, element: int) -> int:
    """Of the keys and values of a token: 2 layers K e, K the width of its keys."""
    return 2 * facts.layers * facts.kv_width * element


def engine_weights(config: Config, facts: ModelFacts) -> int:
    """Of the student inside the rollout engine, in its own number format."""
    return WIDTHS[engine_dtype(config)] * facts.parameters


def cache_tokens(config: Config, facts: ModelFacts, share_bytes: float) -> int:
    """Tokens that fit into what an engine's share leaves beside weights and workspace."""
    rollout, element = config.rollout, WIDTHS[engine_dtype(config)]
    room = share_bytes - engine_weights(config, facts) - ENGINE_WORKSPACE_BYTES
    if isinstance(rollout, VllmRolloutConfig) and rollout.kv_cache_memory_bytes:
        room = rollout.kv_cache_memory_bytes
    return max(0, int(room / cache_bytes(facts, element)))


def least_share(facts: ModelFacts, element: int, cards: int, width: int) -> int:
    """The least of each card with which vLLM starts: weights, workspace, the cache of one sequence."""
    split = element * facts.parameters + width * cache_bytes(facts, element)
    return split // cards + ENGINE_WORKSPACE_BYTES


def process_engine(config: Config, facts: ModelFacts) -> Bytes:
    """A rollout engine inside a training process that keeps its memory: on a CPU, or transformers.

    vLLM: weights and cache. transformers: weights.
    """
    rollout: RolloutConfig = config.rollout
    match rollout:
        case VllmRolloutConfig():
            held = rollout.kv_cache_memory_bytes or CPU_CACHE_BYTES
            return {"engine": engine_weights(config, facts), "engine's cache": held}
        case TransformersRolloutConfig():
            return {"engine": engine_weights(config, facts)}
    return {}


def generation(config: Config, facts: ModelFacts, width: int, sequences: int) -> int:
    """What transformers adds while it generates a batch of B sequences of ``width`` tokens.

    The cache of keys and values, and three float32 [B, tokens, V]: scores, log-probs, and their stack.
    """
    rollout = config.rollout
    if not isinstance(rollout, TransformersRolloutConfig):
        return 0
    rows = min(rollout.batch_size, sequences)
    cache = rows * width * cache_bytes(facts, WIDTHS[engine_dtype(config)])
    return cache + 3 * 4 * rows * rollout.max_tokens * facts.vocab


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """How the teacher's scores travel. ``head``: this process needs the teacher's head."""

    transport: Transport | None
    head: bool
    vocab: int


def scores_sent(
    config: Config, student: ModelFacts, teacher: ModelFacts | None, *, cuda: bool
) -> Sent:
    """The encoding of a training response, from the same function that chooses it in a run."""
    if teacher is None:
        return Sent(transport=None, head=False, vocab=student.vocab)
    vocab = min(student.vocab, teacher.vocab)
    loss: LossConfig = config.loss
    request = loss.request(config.rollout.temperature)
    named = training_sampling(config).support_k
    is_self = isinstance(config.teacher, SelfTeacherConfig)
    dtype = DType.float32 if is_self else config.teacher.hidden_dtype
    element = weight_bytes(config.teacher, teacher, cuda=cuda)
    info = TeacherInfo(
        model=teacher.name,
        vocab_size=teacher.vocab,
        hidden_size=teacher.hidden,
        tokenizer_fingerprint="",
        tokenizer_size=teacher.vocab,
        max_length=0,
        dtype="bfloat16" if element == 2 else "float32",
        linear_head=not teacher.softcap,
    )

    def cheapest(wanted: ScoreRequest) -> Transport:
        found = transports(info, wanted, vocab_size=vocab, hidden_dtype=dtype, named=named)
        return found[0]

    measured = config.eval.kl_prompts and (config.eval.kl_data or config.data.eval)
    whole = request.full or measured
    return Sent(
        transport=cheapest(request) if request.sampled else None,
        head=bool(whole) and cheapest(ScoreRequest(full=True)).want == Want.hidden,
        vocab=vocab,
    )


def scoring_blocks(facts: ModelFacts, tokens: int) -> int:
    """Float32 [C, V] blocks of a teacher's head, C so many that a block has 64 MiB, or all tokens."""
    return SCORE_BLOCKS * 4 * facts.vocab * min(tokens, chunk_rows(facts.vocab, CHUNK_BYTES))


def scoring_head(facts: ModelFacts, element: int) -> Bytes:
    """A teacher's own head in float32 and the blocks of its scores, on the first card of a server.

    A head in float32 that is the model's own tensor is not held twice.
    """
    blocks = scoring_blocks(facts, chunk_rows(facts.vocab, CHUNK_BYTES))
    return {
        "teacher's head": 0 if element == HEAD_BYTES else HEAD_BYTES * facts.head,
        "scores": blocks,
    }


def forward_pass(facts: ModelFacts, element: int, tokens: int) -> int:
    """Of a forward pass without gradient: gate, up, product and four states; the float32 hidden states."""
    per_token = element * (3 * facts.intermediate + 4 * facts.attention + 4 * facts.hidden)
    return tokens * (per_token + 4 * facts.hidden)


def local_teacher(config: Config, facts: ModelFacts, *, cuda: bool) -> Bytes:
    """A teacher inside a training process: a model of its own, or a copy of the student.

    Adapters that can be switched off need no copy.
    """
    match config.teacher:
        case SelfTeacherConfig(weights=SelfTeacher.frozen) if isinstance(
            config.adapter, LoraConfig
        ):
            return {}
        case SelfTeacherConfig(dtype=dtype):
            element = 4 if dtype == DType.auto else WIDTHS[dtype]
        case LocalTeacherConfig():
            element = weight_bytes(config.teacher, facts, cuda=cuda)
        case _:
            return {}
    head = scoring_head(facts, element)["teacher's head"]
    return {"teacher": element * facts.parameters, "teacher's head": head}
