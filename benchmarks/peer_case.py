"""What ``peer_losses.py`` compares: a case, the tokens that all cases share, and our side of it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from opd.assembly.loss import build_loss
from opd.batch import Batch
from opd.config.loss import DivergenceLossConfig, LossConfig
from opd.teacher.scoring import tail_logps
from opd.train.student import with_sequence_gaps
from opd.types import DivergenceKind

V = 17
Tensor = torch.Tensor


Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One loss of a peer and ours, of the same logits [N, V]."""

    peer: str
    tests: str
    what: str
    logits: Tensor
    theirs: Loss
    ours: Loss
    gradient_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Data:
    """Two completions of three and five tokens, as the peers' tests have them, padded to [2, 5]."""

    student_NV: Tensor
    teacher_NV: Tensor
    target_N: Tensor
    engine_N: Tensor
    advantage_B: Tensor
    lengths: tuple[int, int] = (3, 5)

    @property
    def sequence_N(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(2), torch.tensor(self.lengths))

    @property
    def mask_BT(self) -> Tensor:
        rows = [[1.0] * n + [0.0] * (5 - n) for n in self.lengths]
        return torch.tensor(rows, dtype=self.student_NV.dtype)

    def token_weights(self, reduction: str) -> Tensor:
        """The weight [N] of each token in a mean over tokens, over completions, or over [2, 5]."""
        lengths = self.mask_BT.sum(1)
        weight_B = {
            "token": torch.ones_like(lengths) / 8,
            "sequence": 1 / (2 * lengths),
            "constant": torch.ones_like(lengths) / 10,
        }[reduction]
        return weight_B[self.sequence_N]

    def padded(self, values_N: Tensor) -> Tensor:
        """[N] as [2, 5], zero where padded; with gradient."""
        where = torch.arange(2)[:, None] * 5 + torch.arange(5)
        index_N = where[self.mask_BT.bool()]
        zeros = torch.zeros(10, dtype=values_N.dtype)
        return zeros.index_put((index_N,), values_N).view(2, 5)

    def logps(self, logits_NV: Tensor) -> Tensor:
        """Log-probs [N] of the targets."""
        return logits_NV.log_softmax(-1).gather(1, self.target_N[:, None])[:, 0]

    def batch(self, student_NV: Tensor, **fields: Any) -> Batch:
        ids_BT = torch.zeros(2, 1, dtype=torch.int64)
        batch = Batch(
            input_ids_BT=ids_BT,
            attention_mask_BT=ids_BT,
            positions_N=torch.arange(len(self.target_N)),
            target_N=self.target_N,
            engine_logp_N=self.engine_N,
            sequence_N=self.sequence_N,
            teacher_logp_N=self.logps(self.teacher_NV),
            advantage_N=self.advantage_B[self.sequence_N],
            **fields,
        )
        return with_sequence_gaps(batch, self.logps(student_NV).detach())


def data(seed: int, dtype: torch.dtype, *, spread: float = 1.0) -> Data:
    """Normal logits times ``spread``; the same numbers in every dtype."""
    make = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(8, V, generator=make) for _ in range(2))
    engine = (student + 0.3 * torch.randn(8, V, generator=make)).log_softmax(-1)
    target = torch.multinomial(engine.exp(), 1, generator=make)[:, 0]
    return Data(
        student_NV=student.to(dtype),
        teacher_NV=teacher.to(dtype),
        target_N=target,
        engine_N=engine.gather(1, target[:, None])[:, 0].to(dtype),
        advantage_B=torch.randn(2, generator=make).to(dtype),
    )


def ours(config: LossConfig, d: Data, temperature: float = 1.0, **fields: Any) -> Loss:
    """Our loss, summed over tokens, by logits."""

    def loss(logits_NV: Tensor) -> Tensor:
        scaled = logits_NV / temperature
        return build_loss(config)(scaled.log_softmax(-1), d.batch(scaled, **fields)).total

    return loss


def full(d: Data, temperature: float = 1.0) -> dict[str, Tensor]:
    return {"teacher_logp_NV": (d.teacher_NV / temperature).log_softmax(-1)}


def supported(d: Data, ids_NK: Tensor) -> dict[str, Tensor]:
    teacher = d.teacher_NV.log_softmax(-1)
    return {
        "support_ids_NK": ids_NK,
        "support_logp_NK": teacher.gather(1, ids_NK),
        "support_tail_N": tail_logps(teacher, ids_NK),
    }


def jsd(beta: float, **settings: Any) -> DivergenceLossConfig:
    return DivergenceLossConfig(kind=DivergenceKind.jsd, beta=beta, **settings)


MISSING: set[str] = set()
"""Libraries that could not be imported."""


def optional(name: str) -> ModuleType | None:
    """The module, or None when its library is absent, which is then reported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        MISSING.add(name.partition(".")[0])
        return None
