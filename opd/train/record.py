"""Looks at the weights while they are trained, and hands each recording over as one row."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch

from opd.checkpoint.names import Place, place
from opd.checkpoint.tensors import Stored
from opd.config.optim import AdamWConfig
from opd.train.compact import compact_ends
from opd.train.engine import TrainingEngine
from opd.train.record_row import (
    TOP,
    Moments,
    changes,
    columns,
    gradient_sums,
    headline,
    moment_sums,
    row_of,
    spectrum_values,
)
from opd.train.weight_change import Top, packed, subspace_similarity, top_directions, unpacked
from opd.train.weights import layer_of, named_weights
from opd.world import World

KEPT = 16
"""Recordings whose top directions stay, to be compared with the last one's; beyond, every other goes."""

Write = Callable[[int, Mapping[str, Any]], None]


class Recorder(Protocol):
    """Looks at the weights around each optimizer step; every method is collective."""

    def before_step(self, version: int) -> None:
        """Gradients are complete; ``version`` optimizer steps are taken."""
        ...

    def after_step(self, version: int, *, lr: float, norm: float) -> dict[str, float]:
        """Metrics of step ``version``, just taken; ``norm`` is the gradient's before clipping."""
        ...

    def state(self) -> dict[str, Any] | None:
        """What this rank needs to go on."""
        ...

    def resume(self, state: dict[str, Any] | None, folder: str) -> None:
        """Undo of ``state``, found in the checkpoint ``folder``."""
        ...


class NoRecord:
    """Looks at nothing."""

    def before_step(self, version: int) -> None:
        """Nothing to do."""

    def after_step(self, version: int, *, lr: float, norm: float) -> dict[str, float]:
        return {}

    def state(self) -> None:
        return None

    def resume(self, state: dict[str, Any] | None, folder: str) -> None:
        """Nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """One weight: where it starts, what is trained of it, and the rank that measures it."""

    name: str
    at: Place
    stored: Stored
    dtype: torch.dtype
    trained: torch.nn.Parameter | None
    index: torch.Tensor | None
    owner: int

    def start(self, device: torch.device) -> torch.Tensor:
        """The values that training started from, float32 [numel]."""
        return self.stored.read().to(device).to(self.dtype).float().reshape(-1)

    def now(self, start: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
        """The values now, float32 [numel], from the master of what is trained."""
        if self.index is None:
            return master.float().reshape(-1)
        return start.index_copy(0, self.index.long(), master.float().reshape(-1))


class WeightRecorder:
    """Implements ``Recorder`` on every weight of a causal language model, tied ones once.

    Masters, moments and gradients are gathered a tensor at a time; each tensor is measured by one
    rank, which keeps a bit per coordinate (whether it was ever seen changed in bf16) and the top
    directions of up to ``KEPT`` recordings. Step 0 is recorded before the first step.

    Args:
        base: the weights that training starts from, by name.
        every, steps: recorded are multiples of ``every`` and step ``steps``.
        adam: the optimizer whose moments there are to look at; None looks at weights alone.
        write: takes the step and the row, on rank 0.
    """

    def __init__(
        self,
        causal: torch.nn.Module,
        engine: TrainingEngine,
        base: Mapping[str, Stored],
        *,
        every: int,
        steps: int,
        adam: AdamWConfig | None,
        world: World,
        write: Write,
    ) -> None:
        self._engine = engine
        self._weights = list(_weights(causal, base, world.size))
        self._every, self._steps = every, steps
        self._adam = adam
        self._world = world
        self._write = write
        self._ever: dict[str, torch.Tensor] = {}
        self._tops: dict[int, dict[str, torch.Tensor]] = {}
        self._gradients: dict[str, dict[str, float]] = {}
        self._seconds = 0.0

    @torch.no_grad()
    def before_step(self, version: int) -> None:
        began = time.perf_counter()
        if version == 0:
            self._record(0, None)
        if self._adam is not None and self._due(version + 1):
            self._gradients = dict(self._gradient_sums(version))
        self._seconds = time.perf_counter() - began

    @torch.no_grad()
    def after_step(self, version: int, *, lr: float, norm: float) -> dict[str, float]:
        if not self._due(version):
            return {"time/record": self._seconds} if version == 1 else {}
        began = time.perf_counter()
        moments = None
        if self._adam is not None:
            clip = self._adam.max_grad_norm
            factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            moments = Moments(config=self._adam, step=version, lr=lr, clipped=factor)
        row = self._record(version, moments)
        self._seconds += time.perf_counter() - began
        return headline(row) | {"time/record": self._seconds}

    def state(self) -> dict[str, Any]:
        return {"ever": self._ever, "tops": self._tops}

    def resume(self, state: dict[str, Any] | None, folder: str) -> None:
        if state is None:
            raise ValueError(
                f"the checkpoint {folder} was written with record=none, so what changed before it is "
                "not known: go on with record=none, or start another run.dir"
            )
        device = self._world.device
        self._ever = {name: bits.to(device) for name, bits in state["ever"].items()}
        self._tops = {
            step: {name: left.to(device) for name, left in tops.items()}
            for step, tops in state["tops"].items()
        }

    def _due(self, version: int) -> bool:
        return version % self._every == 0 or version == self._steps

    def _gradient_sums(self, version: int) -> Iterator[tuple[str, dict[str, float]]]:
        for weight, states in self._with_states(["exp_avg"] if version else []):
            if weight.trained is None:
                continue
            gradient = self._engine.full_gradient(weight.trained).reshape(-1)
            if weight.owner == self._world.rank:
                yield weight.name, gradient_sums(gradient, states[0] if states else None)

    def _with_states(self, keys: list[str]) -> Iterator[tuple[_Weight, list[torch.Tensor]]]:
        """Each weight with what the optimizer holds of it, a layer's gathered together."""
        for _, layer in groupby(self._weights, key=lambda w: layer_of(w.name)):
            weights = list(layer)
            trained = [w.trained for w in weights if w.trained is not None]
            states = iter(self._engine.full_states(trained, keys))
            for weight in weights:
                yield weight, [] if weight.trained is None else next(states)

    def _record(self, version: int, moments: Moments | None) -> dict[str, Any]:
        earlier = sorted(self._tops)
        names = columns(earlier)
        tops: dict[str, torch.Tensor] = {}
        table: dict[str, float] = {}
        keys = ["master", *([] if moments is None else ["exp_avg", "exp_avg_sq"])]
        for number, (weight, states) in enumerate(self._with_states(keys)):
            found = dict.fromkeys(names, 0.0)
            if weight.owner == self._world.rank:
                found |= self._measured(weight, states, moments, tops)
            table |= {f"{number} {column}": found[column] for column in names}
        table = self._world.sum(table)
        places = [weight.at for weight in self._weights]
        measured = [
            {column: table[f"{number} {column}"] for column in names}
            for number in range(len(places))
        ]
        row = row_of(places, measured, moments, earlier if version == self._steps else [])
        if self._world.is_main:
            self._write(version, row)
        if version:
            self._tops[version] = tops
        if len(self._tops) > KEPT:
            self._tops = {step: self._tops[step] for step in sorted(self._tops)[::-1][::2]}
        return row

    def _measured(
        self,
        weight: _Weight,
        states: list[torch.Tensor],
        moments: Moments | None,
        tops: dict[str, torch.Tensor],
    ) -> dict[str, float]:
        """What is found in a weight, from its master (and moments); none if it is not trained."""
        start = weight.start(self._world.device)
        now = weight.now(start, states[0]) if states else start
        found, changed = changes(start, now)
        ever = changed if weight.name not in self._ever else self._seen(weight) | changed
        self._ever[weight.name] = packed(ever)
        found["ever"] = float(ever.sum())
        found |= self._directions(weight, start, now, tops)
        if moments is not None and states:
            sums = self._gradients[weight.name]
            matrix = len(weight.stored.shape) > 1
            master, first, second = states
            found |= moment_sums(master, first, second, sums, moments, matrix=matrix)
        return found

    def _seen(self, weight: _Weight) -> torch.Tensor:
        return unpacked(self._ever[weight.name], weight.stored.numel)

    def _directions(
        self,
        weight: _Weight,
        start: torch.Tensor,
        now: torch.Tensor,
        tops: dict[str, torch.Tensor],
    ) -> dict[str, float]:
        shape = weight.stored.shape
        if len(shape) != 2 or weight.trained is None:
            return {}
        true = top_directions((now - start).view(shape), TOP)
        visible = top_directions((now.bfloat16() - start.bfloat16()).view(shape), TOP)
        found = spectrum_values(true, visible)
        if true is None:
            return found
        for step, earlier in self._tops.items():
            if weight.name in earlier:
                found |= _similarity(step, earlier[weight.name], true)
        # half the bytes; a similarity loses 1e-3 at most
        tops[weight.name] = true.left.half()
        return found


def _similarity(step: int, earlier: torch.Tensor, top: Top) -> dict[str, float]:
    return {
        f"similar {step}": subspace_similarity(earlier, top.left),
        f"similar {step} chance": top.left.shape[1] / top.left.shape[0],
        f"similar {step} known": 1.0,
    }


def _weights(causal: torch.nn.Module, base: Mapping[str, Stored], ranks: int) -> Iterator[_Weight]:
    """Every weight; the largest is given first, to the rank that has least to measure."""
    ends = compact_ends(causal)
    parameters = dict(named_weights(causal))
    missing = sorted(name for name in parameters if name not in base)
    if missing:
        raise ValueError(
            f"record=weights finds no {missing[0]} in the files of student.model, only in the model "
            "that transformers makes of them: use record=none"
        )
    loads, owners = [0] * ranks, {}
    for name in sorted(parameters, key=lambda name: -base[name].numel):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += base[name].numel
    for name, parameter in parameters.items():
        values, index = ends.get(id(parameter), (None, None))
        trained = values if values is not None else parameter if parameter.requires_grad else None
        yield _Weight(
            name=name,
            at=place(name),
            stored=base[name],
            dtype=parameter.dtype,
            trained=trained,
            index=index,
            owner=owners[name],
        )
