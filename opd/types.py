"""The nouns that flow: Prompt -> Rollout -> ScoredRollout -> Batch -> StepReport.

Legend of shape suffixes, used in every room:
    B rows (sequences)      T positions of a row     N kept target tokens, packed
    K ids of a support      V vocabulary             D hidden width     C a chunk of N

Numpy arrays up to ``ScoredRollout`` (they cross processes); tensors from ``Batch`` (see ``batch.py``) on.
All log-probs are natural logarithms in float32, after the sampling temperature.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BFloat16Bits = npt.NDArray[np.uint16]
"""bfloat16 numbers as their bits, since numpy has no such type."""


class FinishReason(StrEnum):
    """Why a rollout ended: an end token, or the token budget."""

    stop = "stop"
    length = "length"


class DivergenceKind(StrEnum):
    """p is the teacher, q the student."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    skew_kl = "skew_kl"
    skew_reverse_kl = "skew_reverse_kl"


class Weighting(StrEnum):
    """Which tokens count more; each factor lies in [0, 1].

    student_entropy, teacher_entropy: the entropy, as a share of the largest possible one;
    gap: how far apart teacher and student are about the sampled token.
    """

    uniform = "uniform"
    student_entropy = "student_entropy"
    teacher_entropy = "teacher_entropy"
    gap = "gap"


class Correction(StrEnum):
    """What to do about tokens written by other weights or other arithmetic than the learner's.

    Their loss is multiplied by the ratio learner / engine, of the token or (sequence) the geometric
    mean over its completion; truncate: at most a cap; mask: 0 outside a band.
    """

    none = "none"
    truncate = "truncate"
    mask = "mask"
    sequence_truncate = "sequence_truncate"
    sequence_mask = "sequence_mask"


class Surrogate(StrEnum):
    """What a policy gradient raises: clip is PPO's ratio to the engine; plain is the log-prob."""

    clip = "clip"
    plain = "plain"


class Reduction(StrEnum):
    """What the sum of a step's token losses is divided by.

    token: all kept tokens; sequence: each completion by its own kept tokens, then by completions;
    constant: completions times the longest allowed (Dr. GRPO, arXiv 2503.20783).
    """

    token = "token"
    sequence = "sequence"
    constant = "constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, tokenised. No loss reads ``answer``.

    ``teacher`` names who scores it, where there are several. ``teacher_ids`` is the prompt as the
    teacher sees it (another template, a reference solution), by default ``token_ids``.
    ``completion_ids`` is what the data set answers, end token included.
    """

    uid: str
    token_ids: IntArray
    answer: str | None = None
    text: str = ""
    teacher: str | None = None
    teacher_ids: IntArray | None = None
    completion_ids: IntArray | None = None

    def __post_init__(self) -> None:
        assert self.token_ids.dtype == np.int32
        assert self.token_ids.ndim == 1
        assert len(self.token_ids) > 0, f"prompt {self.uid} is empty"
        for ids in (self.teacher_ids, self.completion_ids):
            assert ids is None or (ids.dtype == np.int32 and ids.ndim == 1 and len(ids) > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a rollout engine writes: ``n`` samples a prompt; temperature 0 is greedy.

    ``seed`` and a prompt's ``uid`` and sample number fix every draw, whatever the order of requests.
    ``support_k`` asks the engine for its own k likeliest ids per position (a student top-k support).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 256
    seed: int = 0
    support_k: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What the student wrote, or what a data set holds in its place.

    ``token_ids`` [T] holds the completion, end token included; ``logps`` [T] are the engine's own
    log-probs of it, NaN when it was read from a data set; ``version`` counts the optimizer steps taken
    by the weights that wrote it;
    ``support_ids`` [T, K] are the engine's likeliest ids when ``Sampling.support_k`` asked for them.
    """

    prompt: Prompt
    token_ids: IntArray
    logps: FloatArray
    finish_reason: FinishReason
    version: int
    sample: int = 0
    text: str = ""
    support_ids: IntArray | None = None

    def __post_init__(self) -> None:
        assert self.token_ids.dtype == np.int32
        assert self.logps.dtype == np.float32
        assert self.token_ids.shape == self.logps.shape, "one log-prob for each token"
        assert len(self.token_ids) > 0, "an empty completion teaches nothing"
        assert self.support_ids is None or self.support_ids.shape[0] == len(self.token_ids)

    @property
    def sequence(self) -> IntArray:
        """Prompt and completion, [P + T] int32."""
        return np.concatenate([self.prompt.token_ids, self.token_ids])

    @property
    def teacher_prompt(self) -> IntArray:
        """The prompt as the teacher sees it, [P'] int32."""
        seen = self.prompt.teacher_ids
        return self.prompt.token_ids if seen is None else seen

    @property
    def teacher_sequence(self) -> IntArray:
        """The teacher's prompt and the completion, [P' + T] int32."""
        return np.concatenate([self.teacher_prompt, self.token_ids])


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportLogps:
    """A truncated distribution: ``ids`` [T, K] int32, ``logps`` [T, K], ``tail_logp`` [T].

    Unused places of a ragged support carry id -1 and log-prob -inf. ``tail_logp`` is
    log(1 - sum of the support's probability), -inf when the support is the whole vocabulary.
    """

    ids: IntArray
    logps: FloatArray
    tail_logp: FloatArray

    def __post_init__(self) -> None:
        assert self.ids.shape == self.logps.shape
        assert self.tail_logp.shape == self.ids.shape[:1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout and what the teacher said about each of its T completion tokens.

    ``logps`` [T]: the teacher's log-probs of the sampled tokens. Of the rest, what was wanted:
    ``support``; ``full_logps`` [T, V]; or ``hidden`` [T, D], the teacher's final hidden states, from
    which its head (``Teacher.head``) gives the full distribution without moving it; these are float32,
    or bfloat16 as bits. ``outside`` [T] is the probability that the teacher gave to ids beyond the
    student's, before it was spread over the common ones; only where the two sizes differ.
    ``reward`` is what a verifier gave the whole completion; ``advantage`` is the reward against the
    other completions of the same prompt.
    """

    rollout: Rollout
    logps: FloatArray | None = None
    support: SupportLogps | None = None
    full_logps: FloatArray | None = None
    hidden: FloatArray | BFloat16Bits | None = None
    outside: FloatArray | None = None
    reward: float | None = None
    advantage: float | None = None

    def __post_init__(self) -> None:
        length = len(self.rollout.token_ids)
        for said in (self.logps, self.full_logps, self.hidden, self.outside):
            assert said is None or said.shape[0] == length, "one teacher row for each token"
        assert self.support is None or self.support.ids.shape[0] == length


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What to ask of a teacher besides the log-probs of the sampled tokens.

    ``top_k`` > 0: the teacher's k likeliest ids; ``rollout_support``: the log-probs of each rollout's
    ``support_ids``; both together: their union. ``full``: the whole distribution, as ``full_logps`` or
    as ``hidden``, whichever is the smaller per token. ``temperature`` divides the teacher's logits.
    ``sampled`` False: nothing is asked at all, not even the log-probs of the sampled tokens.
    """

    sampled: bool = True
    top_k: int = 0
    rollout_support: bool = False
    full: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        assert self.sampled or not (self.top_k or self.rollout_support or self.full)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInfo:
    """What a teacher tells of itself before any work: enough to refuse it.

    ``dtype`` is what it computes in. ``linear_head``: its logits are hidden states times a matrix.
    ``added_tokens`` (token -> id) end its vocabulary, ``base_fingerprint`` is about the ids before them.
    """

    model: str
    vocab_size: int
    hidden_size: int
    tokenizer_fingerprint: str
    tokenizer_size: int
    max_length: int
    dtype: str = "float32"
    linear_head: bool = True
    base_fingerprint: str = ""
    added_tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step, already reduced over ranks. Metric names are rooms: ``loss/total``."""

    version: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverState:
    """What a receiver of weights answers: the weights it has, and why it took no others.

    ``run`` names the sender, ``version`` counts that sender's optimizer steps; both None: nothing yet.
    ``mask`` is the fingerprint of the coordinates that it knows; ``refused`` is one sentence.
    """

    run: str | None = None
    version: int | None = None
    mask: str | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation, reduced over ranks, and a few transcripts to look at."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)
