"""One training process of a run, and what a card or a process holds in each phase."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from opd.config.schema import Config
from opd.run.forecast import engines, learner, moments
from opd.run.forecast.learner import Bytes
from opd.run.forecast.setup import TrainingSetup
from opd.run.model_facts import ModelFacts
from opd.teacher.wire import Want


class Phase(StrEnum):
    """What a run does, in the order of a step; ``start`` is before the first, ``save`` after the last."""

    start = "start"
    rollout = "rollout"
    score = "score"
    learn = "learn"
    sync = "sync"
    save = "save"


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The sizes of the student and of each teacher that is known, by its name."""

    student: ModelFacts
    teachers: Mapping[str, ModelFacts] = field(default_factory=dict)

    def scoring(self, config: Config) -> ModelFacts | None:
        """Of the teacher whose scores a learner gets; None without one."""
        name = engines.scoring_model(config)
        if name is None:
            return None
        return self.student if name == self.student.name else self.teachers[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A card, or a process on a CPU: who is on it, and bytes by phase and use.

    ``memory_bytes`` is 0 where it is not known. ``moments`` are what the moments of the learn phase add to
    what is there; the phase is shown at the largest.
    """

    name: str
    holds: tuple[str, ...]
    phases: Mapping[Phase, Bytes]
    memory_bytes: int
    moments: Mapping[str, int] = field(default_factory=dict)
    count: int = 1

    def total(self, phase: Phase) -> int:
        return sum(self.phases[phase].values())

    @property
    def moment(self) -> str:
        """The largest moment of the learn phase; "" on a device without a rank."""
        return max(self.moments, key=lambda name: self.moments[name], default="")

    @property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(Phase, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.worst)

    @property
    def spare(self) -> int:
        """Bytes that stay free in the worst phase; negative where it does not fit."""
        return self.memory_bytes - self.peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A training process."""

    config: Config
    models: Models
    teacher: ModelFacts | None
    setup: TrainingSetup
    sent: engines.Sent

    def resident(self) -> Bytes:
        """The learner, and the teacher's head that it uses."""
        terms = learner.resident(self.setup)
        if self.sent.head and self.teacher is not None:
            copy = learner.teacher_head_copy(self.sent.vocab, self.teacher.hidden)
            terms["teacher's head (learner)"] = copy
        return terms

    def learn(self) -> dict[str, Bytes]:
        """What the moments of a step add."""
        transport = self.sent.transport
        is_full = transport is not None and transport.want != Want.logps
        sent_whole = transport is not None and transport.want == Want.full_logps
        targets = self.setup.work.targets
        return moments.learn_moments(
            self.setup,
            moments.count_blocks(self.config.loss, is_full),
            self.sent.vocab,
            4 * targets * self.sent.vocab if sent_whole else 0,
        )

    def saved_copy(self) -> int:
        """The weights that rank 0 copies to the host, to write the final model."""
        return self.setup.element * self.setup.facts.parameters

    def waiting(self) -> int:
        """Scores of a step on the host."""
        if self.sent.transport is None:
            return 0
        tokens = self.setup.work.sequences * self.config.rollout.max_tokens
        return tokens * self.sent.transport.bytes_per_token


def largest(found: Mapping[str, Bytes]) -> tuple[dict[str, int], Bytes]:
    """The size of each moment, and what the largest adds."""
    sizes = {name: sum(terms.values()) for name, terms in found.items()}
    return sizes, found[max(sizes, key=lambda name: sizes[name])]
