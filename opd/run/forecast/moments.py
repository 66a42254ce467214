"""Bytes that a step of training adds, at its moments: loss, backward pass, optimizer.

Letters as in ``opd.run.forecast.learner``; A is the width of all attention heads, I of the MLP.
"""

from opd.config.loss import DivergenceLossConfig, FunctionLossConfig, LossConfig, Support
from opd.config.train import Precision
from opd.head import CHUNK_BYTES, chunk_rows
from opd.run.forecast.gpus import ALLOCATOR_SHARE
from opd.run.forecast.learner import (
    Bytes,
    accumulated,
    bf16_optimizer,
    start_buffers,
    states_size,
)
from opd.run.forecast.setup import TrainingSetup
from opd.types import DivergenceKind

LIVE_PARAMETERS = 10**9
"""DeepSpeed's stage3_max_live_parameters."""


def learn_moments(
    learner: TrainingSetup, blocks: int, vocab: int, teacher_full: int
) -> dict[str, Bytes]:
    """What a step adds to ``resident``, at four moments: the largest counts.

    ``blocks`` of [C, vocab] are alive in the loss; ``teacher_full`` is a distribution that the teacher sent.
    """
    head = _head_gradient(learner)
    kept = _kept_gradients(learner)
    before = kept if learner.work.micro_batches > 1 else 0
    batch = {"teacher's distribution": teacher_full}
    saved = {"activations": activations(learner)}
    hidden = 2 * 4 * learner.work.targets * learner.facts.hidden
    loss = loss_blocks(learner, blocks, vocab) + head + hidden
    reduction = _reduction(learner, saved["activations"] + loss)
    moments = {
        "loss": {**batch, **saved, "head and loss": loss, "gradients": before},
        "backward": {
            **batch,
            "activations": saved["activations"] + recomputed(learner),
            "head and loss": _cast_head(learner) + head + hidden,
            "gradients": before + (0 if learner.zero == 1 else reduction),
        },
        "end of backward": {
            **batch,
            "activations": recomputed(learner),
            "gradients": kept + _embedding_gradient(learner) + reduction,
            "freed and kept": _kept_holes(learner, reduction),
        },
        "optimizer": {
            "gradients": kept + _flat_gradients(learner),
            "optimizer's temporaries": optimizer_temporaries(learner),
        },
    }
    return {name: _with_allocator(learner, terms) for name, terms in moments.items()}


def layer_activations(learner: TrainingSetup) -> int:
    """Bytes a token that a decoder layer saves for its backward pass, as transformers writes it.

    Two norms: the float32 input, its normalised form and the output, 24 D in fp32 and 16 D in bf16.
    Attention: queries, keys and values repeated to all heads, output: 4 c A, and 2 (4 + 2 c) A more where
    queries and keys are normalised. Gated MLP: gate, its activation, up and product, 4 c I.
    Autocast saves each product's own cast: 6 c D more.
    """
    facts, c = learner.facts, learner.compute
    norms = 2 * (8 + c) * facts.hidden if c == 4 or learner.autocast else 16 * facts.hidden
    casts = 6 * c * facts.hidden if learner.autocast else 0
    attention = 4 * c * facts.attention
    if facts.norm_heads:
        attention += (4 + 2 * c) * (facts.attention + facts.kv_width)
    return norms + casts + attention + 4 * c * facts.intermediate


def activations(learner: TrainingSetup) -> int:
    """Of a micro-batch of B rows of L tokens until its backward pass.

    Every layer's (``layer_activations``), or with gradient checkpointing each layer's input e D; the last
    norm 16 D or 24 D; the hidden states of the targets; the mask B L L; eager attention: its scores.
    """
    facts, work = learner.facts, learner.work
    per_token = (8 + 2 * learner.compute) * facts.hidden + learner.element * facts.hidden
    if learner.checkpointing:
        per_token += learner.element * facts.hidden * facts.layers
    else:
        per_token += layer_activations(learner) * facts.layers
        per_token += _scores(learner) * facts.layers
    states = learner.element * work.targets * facts.hidden
    return work.tokens * per_token + states + _attention_mask(learner) + _weight_casts(learner)


def recomputed(learner: TrainingSetup) -> int:
    """One layer's activations while it is computed again, and the gradients of its MLP: 3 c I + 2 c D.

    ZeRO-3 adds the weights that it has gathered: at most its live parameters.
    """
    facts = learner.facts
    per_token = learner.compute * (3 * facts.intermediate + 2 * facts.hidden)
    if learner.checkpointing:
        per_token += layer_activations(learner) + _scores(learner)
    gathered = min(LIVE_PARAMETERS, 2 * facts.layer + facts.head) if learner.zero == 3 else 0
    return learner.work.tokens * per_token + gathered * learner.element


def loss_blocks(learner: TrainingSetup, blocks: int, vocab: int) -> int:
    """``blocks`` float32 [C, V], and two blocks of rows of the head in float32, a quarter of a chunk each."""
    rows = min(learner.work.targets, chunk_rows(vocab, learner.chunk_bytes))
    head_rows = min(CHUNK_BYTES // 4, 4 * vocab * learner.facts.hidden)
    return blocks * 4 * rows * vocab + 2 * head_rows


def count_blocks(loss: LossConfig, full: bool) -> int:
    """How many [C, V] tensors are alive at once in ``chunked_loss`` with this loss.

    Teacher, student, value and slope: 4 with the whole distribution; mixtures need 6. A support or a sampled
    token: 3 (student, gradient, one temporary). A loss of the user's own is taken to need 5.
    """
    if isinstance(loss, FunctionLossConfig):
        return 5
    if not isinstance(loss, DivergenceLossConfig) or loss.support != Support.full:
        return 3
    mixtures = (DivergenceKind.jsd, DivergenceKind.skew_kl, DivergenceKind.skew_reverse_kl)
    return (6 if loss.kind in mixtures else 4) if full else 3


def optimizer_temporaries(learner: TrainingSetup) -> int:
    """AdamW's denominator: one copy of the partition on CUDA (foreach), on a CPU two of the largest tensor.

    Before it the norm of ZeRO-2 takes each gradient in float64: 8 times the largest. SGD with weight decay
    copies the gradients.
    """
    if learner.offload_states:
        return 0
    one = _largest_stepped(learner)
    norm = 8 * min(_largest_trained(learner), states_size(learner)) if learner.zero == 2 else 0
    if learner.states < 2:
        return max(norm, (states_size(learner) if learner.cuda else one) if learner.decays else 0)
    return max(norm, states_size(learner) if learner.cuda else 2 * one)


def _kept_gradients(learner: TrainingSetup) -> int:
    """Gradients at the end of a micro-batch, beside ``standing_gradients``.

    ZeRO-2: the partition, 4 T / N (in fp32 and pure bf16 twice where there are several micro-batches).
    Otherwise e T.
    """
    if learner.zero == 3 or bf16_optimizer(learner):
        return 0
    if learner.zero == 2:
        if learner.offload_states:
            return 0
        twice = learner.precision != Precision.bf16 and learner.work.micro_batches > 1
        part = int(accumulated(learner) * learner.trained * learner.share)
        return 2 * part if twice else part
    return learner.element * learner.trained


def _reduction(learner: TrainingSetup, loss: int) -> int:
    """Buckets into which gradients are copied, two with overlap, and the copy of one that is sent.

    ZeRO-3 has its bucket all the time; ZeRO-1 in bf16 sends all gradients at once. On a CPU the pages of a
    bucket that no gradient is written to are there if another moment has used them: those of ``loss``, or of
    the start.
    """
    if not learner.zero:
        return 0
    if bf16_optimizer(learner):
        return 2 * learner.trained
    sent = learner.element * min(learner.bucket, learner.trained)
    if learner.zero == 3:
        return sent
    whole = learner.element * learner.bucket
    if not learner.cuda:
        used = learner.element * learner.trained + loss + start_buffers(learner)
        whole = min(whole, used)
    return sent + whole * (2 if learner.overlap else 1)


def _kept_holes(learner: TrainingSetup, reduction: int) -> int:
    """On a CPU freed memory is kept: the room of the optimizer's temporaries, if a bucket does not fit there.

    The states of the first step are put into the first bucket's room, so that later buckets lie elsewhere.
    """
    temporaries = optimizer_temporaries(learner)
    fits = reduction <= temporaries
    return 0 if learner.cuda or learner.zero not in (1, 2) or fits else temporaries


def _flat_gradients(learner: TrainingSetup) -> int:
    """What the step of ZeRO-1 and 2 copies the partition's gradients into; bf16 has them flat already."""
    if learner.zero not in (1, 2) or learner.precision == Precision.bf16 or learner.offload_states:
        return 0
    return int(learner.master * learner.trained * learner.share)


def _head_gradient(learner: TrainingSetup) -> int:
    """4 V D, float32, of ``chunked_loss``; a masked head has it too, for the gather comes after."""
    return 4 * learner.facts.head if learner.head_trained else 0


def _cast_head(learner: TrainingSetup) -> int:
    """The head's gradient in the dtype of its weight, beside the float32 one."""
    return (
        learner.element * learner.facts.head if learner.head_trained and learner.element == 2 else 0
    )


def _embedding_gradient(learner: TrainingSetup) -> int:
    """The dense gradient of the embedding e V D, and the head's that waits for it where they are tied."""
    if not learner.head_trained:
        return 0
    return learner.element * learner.facts.embedding * (2 if learner.facts.tied else 1)


def _largest_stepped(learner: TrainingSetup) -> int:
    """Bytes of the largest tensor that the optimizer steps; DeepSpeed's is the flat partition."""
    return states_size(learner) if learner.zero else 4 * _largest_trained(learner)


def _largest_trained(learner: TrainingSetup) -> int:
    """Numbers of the largest tensor that has a gradient, under a mask or adapters in proportion."""
    share = learner.trained / learner.facts.parameters
    return int(learner.facts.largest * min(1.0, share))


def _scores(learner: TrainingSetup) -> int:
    """Bytes a token of eager attention: float32 softmax, its cast and the scores, for each head."""
    if not learner.eager:
        return 0
    return learner.facts.heads * learner.work.width * (4 + 2 * learner.compute)


def _attention_mask(learner: TrainingSetup) -> int:
    """B L L: boolean, and once in the dtype of the scores."""
    return learner.work.tokens * learner.work.width * (1 + learner.compute)


def _weight_casts(learner: TrainingSetup) -> int:
    """2 bytes for each linear weight that autocast casts."""
    return 2 * learner.facts.linear if learner.autocast else 0


def _with_allocator(learner: TrainingSetup, terms: Bytes) -> Bytes:
    """On CUDA, what the caching allocator holds beside what is used."""
    if not learner.cuda:
        return terms
    return {**terms, "allocator": int(ALLOCATOR_SHARE * sum(terms.values()))}
