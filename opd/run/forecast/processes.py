"""What the processes of a run on a CPU hold in each phase: nothing sleeps, freed memory is kept."""

from opd.config.rollout import ServerRolloutConfig, VllmRolloutConfig
from opd.config.teacher import ServedTeacherConfig, TeacherBackend
from opd.rollout.vllm import CPU_CACHE_BYTES
from opd.run.forecast import engines
from opd.run.forecast.learner import Bytes, added
from opd.run.forecast.rank import Device, Phase, Rank, largest
from opd.run.placement import PlacedServer, Placement

LIBRARIES_BYTES = 490 << 20
"""Interpreter and libraries of a training process before it loads a model, as benchmarks/plan_accuracy.py
--libraries measures it."""
VLLM_BYTES = 185 << 20
"""What vLLM's modules add to them, measured in the same way."""


def process_devices(placement: Placement, rank: Rank) -> tuple[Device, ...]:
    """The ranks, which are alike, and each server."""
    memory = placement.cards.memory_bytes
    moments, phases = _rank_phases(rank)
    ranks = Device(
        name="each rank" if len(placement.ranks) > 1 else "the rank",
        holds=("a rank",),
        phases=_without_zeros(phases),
        memory_bytes=memory,
        moments=moments,
        count=len(placement.ranks),
    )
    servers = [
        Device(
            name=f"{'teacher' if server in placement.teachers else 'rollout'} server",
            holds=(server.model,),
            phases=_without_zeros(_server_phases(rank, server, server in placement.teachers)),
            memory_bytes=memory,
        )
        for server in (*placement.teachers, *placement.rollout_servers)
    ]
    return (ranks, *servers)


def _rank_phases(rank: Rank) -> tuple[dict[str, int], dict[Phase, Bytes]]:
    config, setup, student = rank.config, rank.setup, rank.models.student
    teacher = student if rank.teacher is None else rank.teacher
    local = engines.local_teacher(config, teacher, cuda=False)
    is_vllm = isinstance(config.rollout, VllmRolloutConfig)
    always = _libraries(is_vllm) | rank.resident() | engines.process_engine(config, student)
    always = added(always, local)
    moments, learn = largest(rank.learn())
    generating = engines.generation(config, student, setup.work.width, setup.work.sequences)
    scoring = _scoring(rank) if local else 0
    waiting = {"waiting scores": rank.waiting()}
    return moments, {
        Phase.start: always | {"loading": _loading(rank)},
        Phase.rollout: always | {"generation": generating},
        Phase.score: always | waiting | {"scores": scoring},
        Phase.learn: added(always | waiting, learn),
        Phase.sync: always | {"gathered weights": _gathered(rank)},
        Phase.save: always | {"saved copy": rank.saved_copy()},
    }


def _loading(rank: Rank) -> int:
    """The student's file, mapped while it is cast; without a cast its pages are the weights."""
    facts = rank.models.student
    stored = 4 if facts.dtype == "float32" else 2
    return 0 if stored == rank.setup.element else stored * facts.parameters


def _scoring(rank: Rank) -> int:
    """A forward pass of the local teacher and the blocks of its head."""
    assert rank.teacher is not None
    element = engines.weight_bytes(rank.config.teacher, rank.teacher, cuda=False)
    tokens = min(
        rank.config.teacher.max_num_batched_tokens,
        rank.setup.work.sequences * rank.setup.work.width,
    )
    blocks = engines.scoring_blocks(rank.teacher, tokens)
    return blocks + engines.forward_pass(rank.teacher, element, tokens)


def _gathered(rank: Rank) -> int:
    facts = rank.models.student
    return rank.setup.element * max(facts.layer, facts.embedding)


def _server_phases(rank: Rank, server: PlacedServer, is_teacher: bool) -> dict[Phase, Bytes]:
    config = rank.config
    scoring: Bytes = {}
    if is_teacher:
        assert isinstance(config.teacher, ServedTeacherConfig)
        facts = rank.models.teachers[server.model]
        element = engines.weight_bytes(config.teacher, facts, cuda=False)
        head = engines.scoring_head(facts, element)
        is_vllm = config.teacher.backend == TeacherBackend.vllm
        always = _libraries(is_vllm) | {
            "teacher": element * facts.parameters,
            "teacher's head": 4 * facts.head if is_vllm else head["teacher's head"],
            "teacher's cache": config.teacher.kv_cache_memory_bytes if is_vllm else 0,
        }
        forward = engines.forward_pass(facts, element, config.teacher.max_num_batched_tokens)
        scoring = {"scores": head["scores"] + forward}
    else:
        assert isinstance(config.rollout, ServerRolloutConfig)
        student = rank.models.student
        always = _libraries(True) | {
            "engine": engines.engine_weights(config, student),
            "engine's cache": config.rollout.kv_cache_memory_bytes or CPU_CACHE_BYTES,
        }
    return {phase: always | (scoring if phase == Phase.score else {}) for phase in Phase}


def _libraries(vllm: bool) -> Bytes:
    return {"interpreter and libraries": LIBRARIES_BYTES + (VLLM_BYTES if vllm else 0)}


def _without_zeros(phases: dict[Phase, Bytes]) -> dict[Phase, Bytes]:
    return {phase: {n: b for n, b in terms.items() if b} for phase, terms in phases.items()}
