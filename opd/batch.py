"""ScoredRollout -> Batch: padded or packed tensors, and the one shift by one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import numpy.typing as npt
import torch

from opd.packing import Layout, Packing, arrange
from opd.spans import SpanRows
from opd.types import FloatArray, IntArray, Reduction, ScoredRollout


@dataclass(frozen=True, slots=True, kw_only=True)
class LossReduction:
    """Which tokens are learned from, and what a step's sum of token losses is divided by.

    The first ``prefix_fraction`` of each completion is kept: rounded up, at least one token.
    ``reduction`` chooses the divisor; ``max_tokens``, the longest completion allowed, is used by
    ``Reduction.constant`` only.
    """

    reduction: Reduction = Reduction.token
    prefix_fraction: float = 1.0
    max_tokens: int = 1

    def kept(self, scored: ScoredRollout) -> int:
        """How many tokens of a completion, from its start, are learned from."""
        share = self.prefix_fraction * len(scored.rollout.token_ids)
        return max(1, math.ceil(share - 1e-9))  # 0.07 * 100 is 7.000000000000001

    def denominator(self, scored: Sequence[ScoredRollout]) -> float:
        """The contribution of these sequences to the divisor of a step's sum."""
        match self.reduction:
            case Reduction.token:
                return float(sum(map(self.kept, scored)))
            case Reduction.sequence:
                return float(len(scored))
            case Reduction.constant:
                return float(len(scored) * self.max_tokens)

    def weights(self, scored: ScoredRollout) -> FloatArray:
        """The factor of each kept token's loss, [kept] float32."""
        kept = self.kept(scored)
        weight = 1.0 / kept if self.reduction == Reduction.sequence else 1.0
        return np.full(kept, weight, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch. Row n of every ``N`` field is about the same target token.

    ``positions_N`` are flat indices into [B * T] of the hidden state that predicts ``target_N``: the
    shift by one is there and nowhere else. Teacher fields that were not requested are None.
    Unused entries of a support have id -1 and log-prob -inf.

    ``attention_mask_BT`` is 0 at padding. ``position_ids_BT`` is given where rows hold several sequences: it
    begins with 0 in each of them, and attention does not cross from one into another.

    ``weight_N`` multiplies each token's loss, None is 1. ``sequence_N`` is the number of a token's
    completion in the batch, ``advantage_N`` that completion's advantage, from a reward. The fields
    ``span_`` are those of ``SpanRows``, numbered over the batch; with them the teacher's rows are over its
    own vocabulary, and ``rows`` must not divide a span. ``engine_logp_N`` is NaN where no engine wrote the
    token; ``engine_ids_NK`` are the engine's likeliest ids, where they were requested. ``sequence_gap_N`` is
    the sum, and ``sequence_mean_gap_N`` the mean, over a completion's
    kept tokens of learner less engine log-prob; the student fills both for losses that need them. One
    ``teacher`` scored the whole batch.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    positions_N: torch.Tensor
    target_N: torch.Tensor
    engine_logp_N: torch.Tensor
    position_ids_BT: torch.Tensor | None = None
    engine_ids_NK: torch.Tensor | None = None
    weight_N: torch.Tensor | None = None
    sequence_N: torch.Tensor | None = None
    teacher: str | None = None
    teacher_logp_N: torch.Tensor | None = None
    support_ids_NK: torch.Tensor | None = None
    support_logp_NK: torch.Tensor | None = None
    support_tail_N: torch.Tensor | None = None
    teacher_logp_NV: torch.Tensor | None = None
    teacher_hidden_ND: torch.Tensor | None = None
    teacher_outside_N: torch.Tensor | None = None
    span_N: torch.Tensor | None = None
    span_target_N: torch.Tensor | None = None
    span_logp_N: torch.Tensor | None = None
    span_single_N: torch.Tensor | None = None
    future_N: torch.Tensor | None = None
    advantage_N: torch.Tensor | None = None
    sequence_gap_N: torch.Tensor | None = None
    sequence_mean_gap_N: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """N, the number of kept target tokens."""
        return self.target_N.shape[0]

    def rows(self, start: int, stop: int) -> "Batch":
        """Target tokens start..stop; fields of whole sequences [B, T] are unchanged."""
        selected = {n: v[start:stop] for n, v in self._tensors() if not n.endswith("_BT")}
        return replace(self, **selected)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors()})

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                yield f.name, value


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """``total`` (scalar, with gradient) and metrics: ``sums`` over tokens, never means; ``maxima``.

    A sum is reported per token. One whose name is also in ``counts`` is a sum over that many tokens
    only, and is reported per one of those.
    """

    total: torch.Tensor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)


TOKEN_MEAN = LossReduction()


def collate(
    scored: Sequence[ScoredRollout],
    *,
    pad_id: int,
    discount: float = 0.0,
    reduction: LossReduction = TOKEN_MEAN,
    packing: Packing = Packing.off,
) -> Batch:
    """Lay sequences into rows, padded on the right, and align the log-probs of engine and teacher.

    ``discount`` > 0 fills ``future_N`` with sum over k >= 1 of discount^k (teacher - engine) log-prob of
    the tokens that follow, the part of a discounted reverse-KL return that lies ahead of each token;
    tokens that no engine wrote add nothing to it.
    Tokens that ``reduction`` does not keep are in the model's input and are not targets.
    """
    assert scored, "a micro-batch has at least one sequence"
    assert len({s.rollout.prompt.teacher for s in scored}) == 1, "a batch has one teacher"
    keeps = [reduction.kept(s) for s in scored]
    layout = arrange([len(s.rollout.sequence) for s in scored], packing)
    ids_BT, mask_BT, position_ids_BT = _laid_out(scored, layout, pad_id)
    positions = _positions(scored, keeps, layout)

    def joined(parts: Sequence[np.ndarray | None]) -> torch.Tensor | None:
        return _joined_if_all(
            [None if p is None else p[:keep] for p, keep in zip(parts, keeps, strict=True)]
        )

    supports = [s.support for s in scored]
    spans = [s.spans for s in scored]
    return Batch(
        input_ids_BT=torch.from_numpy(ids_BT),
        attention_mask_BT=torch.from_numpy(mask_BT),
        position_ids_BT=None if packing == Packing.off else torch.from_numpy(position_ids_BT),
        positions_N=torch.from_numpy(np.concatenate(positions)),
        target_N=_joined([ids_BT.reshape(-1)[p + 1] for p in positions]),
        engine_logp_N=_joined(
            [s.rollout.logps[:keep] for s, keep in zip(scored, keeps, strict=True)]
        ),
        engine_ids_NK=joined([_as_int64(s.rollout.support_ids) for s in scored]),
        weight_N=_joined([reduction.weights(s) for s in scored]),
        sequence_N=torch.from_numpy(np.repeat(np.arange(len(scored)), keeps)),
        teacher=scored[0].rollout.prompt.teacher,
        teacher_logp_N=joined([s.logps for s in scored]),
        support_ids_NK=joined([None if s is None else _as_int64(s.ids) for s in supports]),
        support_logp_NK=joined([None if s is None else s.logps for s in supports]),
        support_tail_N=joined([None if s is None else s.tail_logp for s in supports]),
        teacher_logp_NV=joined([s.full_logps for s in scored]),
        teacher_hidden_ND=_from_bits(joined([s.hidden for s in scored])),
        teacher_outside_N=joined([s.outside for s in scored]),
        span_N=_span_numbers(spans, keeps),
        span_target_N=joined([None if s is None else _as_int64(s.targets) for s in spans]),
        span_logp_N=joined([None if s is None else s.logps for s in spans]),
        span_single_N=joined([None if s is None else s.single for s in spans]),
        future_N=joined([_future(s, discount) for s in scored]) if discount else None,
        advantage_N=joined([_advantages(s) for s in scored]),
    )


def _laid_out(
    scored: Sequence[ScoredRollout], layout: Layout, pad_id: int
) -> list[npt.NDArray[np.int64]]:
    """Token ids, attention mask and positions, [B, T] each; padding at a row's end is a sequence too."""
    shape = (layout.height, layout.width)
    ids_BT = np.full(shape, pad_id, np.int64)
    mask_BT = np.zeros(shape, np.int64)
    position_ids_BT = np.zeros(shape, np.int64)
    filled = np.zeros(layout.height, np.int64)
    for item, row, start in zip(scored, layout.rows, layout.starts, strict=True):
        end = start + len(item.rollout.sequence)
        ids_BT[row, start:end] = item.rollout.sequence
        mask_BT[row, start:end] = 1
        position_ids_BT[row, start:end] = np.arange(end - start)
        filled[row] = end
    for row, end in enumerate(filled):
        position_ids_BT[row, end:] = np.arange(layout.width - end)
    return [ids_BT, mask_BT, position_ids_BT]


def _positions(
    scored: Sequence[ScoredRollout], keeps: Sequence[int], layout: Layout
) -> list[npt.NDArray[np.int64]]:
    """For each sequence the flat indices of the hidden states that predict its kept tokens."""
    # the hidden state of a prompt's last token predicts the first target
    firsts = [len(s.rollout.prompt.token_ids) - 1 for s in scored]
    places = zip(layout.rows, layout.starts, firsts, keeps, strict=True)
    return [
        row * layout.width + start + first + np.arange(keep) for row, start, first, keep in places
    ]


def _span_numbers(spans: Sequence[SpanRows | None], keeps: Sequence[int]) -> torch.Tensor | None:
    """The span of each kept token, [N], with numbers that occur in one completion only; -1 is none."""
    parts: list[np.ndarray | None] = []
    first = 0
    for rows, keep in zip(spans, keeps, strict=True):
        ids = None if rows is None else rows.kept_ids(keep).astype(np.int64)
        parts.append(None if ids is None else np.where(ids < 0, -1, ids + first))
        first += keep
    return _joined_if_all(parts)


def _from_bits(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """bfloat16 is received as its bits in uint16; other dtypes are unchanged."""
    if tensor is None or tensor.dtype != torch.uint16:
        return tensor
    return tensor.view(torch.bfloat16)


def _future(item: ScoredRollout, discount: float) -> FloatArray:
    """See ``discount`` of ``collate``; [T]."""
    assert item.logps is not None, "a discounted return needs the teacher's sampled log-probs"
    gain = np.nan_to_num((item.logps - item.rollout.logps).astype(np.float64))
    ahead = np.zeros(len(gain) + 1)
    for t in reversed(range(len(gain))):
        ahead[t] = gain[t] + discount * ahead[t + 1]
    return (discount * ahead[1:]).astype(np.float32)


def _advantages(item: ScoredRollout) -> FloatArray | None:
    """The completion's advantage, once per token."""
    if item.advantage is None:
        return None
    return np.full(len(item.rollout.token_ids), item.advantage, np.float32)


def _as_int64(ids: IntArray | None) -> np.ndarray | None:
    """The integer type that torch indexes with."""
    return None if ids is None else ids.astype(np.int64)


def _joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _joined_if_all(parts: Sequence[np.ndarray | None]) -> torch.Tensor | None:
    """None if no sequence has the field."""
    present = [p for p in parts if p is not None]
    assert len(present) in (0, len(parts)), "all sequences of a batch are scored one way"
    return _joined(present) if present else None
