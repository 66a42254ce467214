"""Bytes that a training process holds in every phase.

P parameters, T trained numbers, N ranks, D hidden, V ids, C tokens of a chunk; e bytes of a weight, c of a
number in a matrix product, m of a master weight. Read against DeepSpeed 0.19.8 and torch 2.13.
"""

from opd.config.train import Precision
from opd.run.forecast.setup import TrainingSetup

Bytes = dict[str, int]
"""Bytes by what they are for."""


def added(held: Bytes, more: Bytes) -> Bytes:
    """The terms of both, summed where both have one."""
    return held | {name: held.get(name, 0) + size for name, size in more.items()}


def weights(learner: TrainingSetup) -> int:
    """e P, under ZeRO-3 e P / N; 0 where they are offloaded. Adapters are added to P."""
    adapters = (
        0 if learner.trained >= learner.facts.parameters or learner.compact else learner.trained
    )
    held = learner.element * (learner.facts.parameters + adapters)
    if learner.offload_weights:
        return 0
    return _part(held, learner.ranks) if learner.zero == 3 else held


def mask_indices_and_values(learner: TrainingSetup) -> int:
    """(4 + e) T of a compact mask: int32 coordinates and the values beside the dense weights."""
    values = learner.element * learner.compact
    return 4 * learner.compact + (_part(values, learner.ranks) if learner.zero == 3 else values)


def initial_copy(learner: TrainingSetup) -> int:
    """(4 + 1) P of mask.training=restore: the initial weights in float32, and which are kept."""
    return 5 * learner.restored


def masters(learner: TrainingSetup) -> int:
    """m T / N with ZeRO, also in fp32, where DeepSpeed copies its partition; none without DeepSpeed.

    Stage 0 keeps 4 T in bf16 and none in fp32.
    """
    if learner.zero is None or learner.offload_states:
        return 0
    if learner.zero == 0:
        return 0 if learner.precision == Precision.fp32 else 4 * learner.trained
    return int(learner.master * learner.trained * learner.share)


def optimizer_states(learner: TrainingSetup) -> int:
    """m T / N for each of the optimizer's numbers: two of AdamW, one of SGD with momentum."""
    return 0 if learner.offload_states else learner.states * states_size(learner)


def standing_gradients(learner: TrainingSetup) -> int:
    """Gradients that lie there between steps too.

    ZeRO-1 in bf16 (BF16_Optimizer): (4 + 2) T, all of them in float32 and the zeroed bf16 ones. ZeRO-3:
    4 T / N and a bucket of e bytes a number.
    """
    if bf16_optimizer(learner):
        return 6 * learner.trained
    if learner.zero != 3:
        return 0
    partition = (
        0 if learner.offload_states else int(accumulated(learner) * learner.trained * learner.share)
    )
    numbers = learner.bucket if learner.cuda else min(learner.bucket, learner.trained)
    return partition + numbers * learner.element


def teacher_head_copy(teacher_vocab: int, teacher_hidden: int) -> int:
    """4 V D: the head with which this process turns the teacher's hidden states into log-probs."""
    return 4 * teacher_vocab * teacher_hidden


def resident(learner: TrainingSetup) -> Bytes:
    """What the learner holds in every phase once it is built."""
    return {
        "weights": weights(learner),
        "mask: indices and values": mask_indices_and_values(learner),
        "initial copy": initial_copy(learner),
        "fp32 masters": masters(learner),
        "optimizer states": optimizer_states(learner),
        "gradients": standing_gradients(learner),
    }


def offloaded(learner: TrainingSetup) -> int:
    """Host memory of a rank: masters, states and two float32 gradients of its partition; its weights."""
    partition = int(learner.trained * learner.share)
    states = (learner.master + 8 + learner.states * learner.master) * partition
    held = _part(learner.element * learner.facts.parameters, learner.ranks)
    return (states if learner.offload_states else 0) + (held if learner.offload_weights else 0)


def _part(total: int, ranks: int) -> int:
    return -(-total // ranks)


def states_size(learner: TrainingSetup) -> int:
    """One number of ``master`` bytes for each trained number of this rank."""
    size = (
        learner.master
        if learner.zero
        else (2 if learner.element == 2 and learner.zero is None else 4)
    )
    return int(size * learner.trained * learner.share)


def bf16_optimizer(learner: TrainingSetup) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer: stage 1, float32 accumulation, nothing offloaded."""
    plain = learner.precision == Precision.bf16 and not learner.offload_states
    return learner.zero == 1 and plain


def accumulated(learner: TrainingSetup) -> int:
    """Bytes of a gradient that is summed over micro-batches."""
    return 4 if learner.precision == Precision.bf16 and learner.zero else learner.element


def start_buffers(learner: TrainingSetup) -> int:
    """What ZeRO-1 and 2 hold for a moment while they start: flat weights e T, zero gradients m T / N."""
    if learner.zero not in (1, 2):
        return 0
    return learner.element * learner.trained + states_size(learner)
