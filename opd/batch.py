"""Scored -> Batch: padded tensors, and the one shift by one."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from opd.types import FloatArray, Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch. Row n of every ``N`` field is about the same target token.

    ``positions_N`` are flat indices into [B * T] of the hidden state that predicts ``target_N``: the
    shift by one lives there and nowhere else. Absent teacher fields were not asked for.
    Unused places of a support carry id -1 and log-prob -inf.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    positions_N: torch.Tensor
    target_N: torch.Tensor
    engine_logp_N: torch.Tensor
    teacher_logp_N: torch.Tensor | None = None
    support_ids_NK: torch.Tensor | None = None
    support_logp_NK: torch.Tensor | None = None
    support_tail_N: torch.Tensor | None = None
    teacher_logp_NV: torch.Tensor | None = None
    teacher_hidden_ND: torch.Tensor | None = None
    future_N: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """N, the number of kept target tokens."""
        return self.target_N.shape[0]

    def rows(self, start: int, stop: int) -> "Batch":
        """Target tokens start..stop; what belongs to whole sequences stays as it is."""
        cut = {
            f.name: value[start:stop]
            for f in fields(self)
            if not f.name.endswith("_BT") and (value := getattr(self, f.name)) is not None
        }
        return replace(self, **cut)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``."""
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if (value := getattr(self, f.name)) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """``total`` (scalar, with gradient) and metrics: ``sums`` over tokens, never means; ``maxima``."""

    total: torch.Tensor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)


def collate(scored: Sequence[Scored], *, pad_id: int, discount: float = 0.0) -> Batch:
    """Right-pad sequences to the longest and line up what engine and teacher said.

    ``discount`` > 0 fills ``future_N`` with sum over k >= 1 of discount^k (teacher - engine) log-prob of
    the tokens that follow, the part of a discounted reverse-KL return that lies ahead of each token.
    """
    assert scored, "a micro-batch has at least one sequence"
    lengths = [len(s.rollout.sequence) for s in scored]
    width = max(lengths)
    ids_BT = np.full((len(scored), width), pad_id, np.int64)
    mask_BT = np.zeros((len(scored), width), np.int64)
    positions = []
    for row, (item, length) in enumerate(zip(scored, lengths, strict=True)):
        ids_BT[row, :length] = item.rollout.sequence
        mask_BT[row, :length] = 1
        first = (
            len(item.rollout.prompt.token_ids) - 1
        )  # this hidden state predicts the first target
        positions.append(row * width + np.arange(first, length - 1))
    supports = [s.support for s in scored]
    return Batch(
        input_ids_BT=torch.from_numpy(ids_BT),
        attention_mask_BT=torch.from_numpy(mask_BT),
        positions_N=torch.from_numpy(np.concatenate(positions)),
        target_N=_joined([s.rollout.token_ids.astype(np.int64) for s in scored]),
        engine_logp_N=_joined([s.rollout.logps for s in scored]),
        teacher_logp_N=_joined_if_all([s.logps for s in scored]),
        support_ids_NK=_joined_if_all(
            [None if s is None else s.ids.astype(np.int64) for s in supports]
        ),
        support_logp_NK=_joined_if_all([None if s is None else s.logps for s in supports]),
        support_tail_N=_joined_if_all([None if s is None else s.tail_logp for s in supports]),
        teacher_logp_NV=_joined_if_all([s.full_logps for s in scored]),
        teacher_hidden_ND=_joined_if_all([s.hidden for s in scored]),
        future_N=_joined([_future(s, discount) for s in scored]) if discount else None,
    )


def micro_batches(scored: Sequence[Scored], *, tokens: int) -> list[list[Scored]]:
    """Cut a rank's share into groups of at most ``tokens`` padded tokens, longest sequences first.

    A sequence longer than ``tokens`` gets a group of its own.
    """
    groups: list[list[Scored]] = []
    for item in sorted(scored, key=lambda s: -len(s.rollout.sequence)):
        width = len(groups[-1][0].rollout.sequence) if groups else 0
        if groups and (len(groups[-1]) + 1) * width <= tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _future(item: Scored, discount: float) -> FloatArray:
    assert item.logps is not None, "a discounted return needs the teacher's sampled log-probs"
    gain = (item.logps - item.rollout.logps).astype(np.float64)
    ahead = np.zeros(len(gain) + 1)
    for t in reversed(range(len(gain))):
        ahead[t] = gain[t] + discount * ahead[t + 1]
    return (discount * ahead[1:]).astype(np.float32)


def _joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _joined_if_all(parts: Sequence[np.ndarray | None]) -> torch.Tensor | None:
    present = [p for p in parts if p is not None]
    assert len(present) in (0, len(parts)), "a batch is scored one way"
    return _joined(present) if present else None
