"""The shapes of the lines of a run's files, as its reports read them."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

Metrics = dict[str, int | float | None]
"""A line of metrics.jsonl; null stands for a number that was not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLine:
    """What is read of a line of samples.jsonl."""

    step: int
    tokens: list[str] | None = None
    gap: list[float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mean:
    """The mean over matrices."""

    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Precision:
    """The change of weights in one number format."""

    exact_zero: float
    below_1e_05: Annotated[float, Field(alias="1e-05")]
    relative_norm: float | None
    stable_rank: _Mean | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Similarity:
    """The subspace similarity to an earlier recording."""

    mean: float
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adam:
    """Figures of AdamW's moments."""

    step_visible: float | None
    zero_gradient_visible: float | None
    root_v_variation: float | None
    cosine_m_g: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ratios:
    """The figures of a group of weights."""

    fp32: _Precision
    bf16: _Precision
    ulps: dict[str, float]
    never: float
    cancelled: float
    final: float
    similarity: _Similarity | None
    adam: _Adam | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLine:
    """What is read of a line of weights.jsonl."""

    step: int
    all: _Ratios
    blocks: dict[str, _Ratios]
    similarity_to_end: dict[int, _Mean | None] = field(default_factory=dict)
