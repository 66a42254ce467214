"""Measures the weights while they are trained; each recording is one row of the record."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch

from opd.checkpoint.names import Place, place
from opd.checkpoint.tensors import Stored
from opd.config.optim import AdamWConfig
from opd.train.checkpoint_layout import layer_key
from opd.train.compact import compact_ends
from opd.train.engine import TrainingEngine
from opd.train.record_row import (
    TOP,
    Moments,
    build_row,
    changes,
    columns,
    gradient_sums,
    headline,
    moment_sums,
    similarity_values,
    spectrum_values,
)
from opd.train.weight_change import packed, top_directions, unpacked
from opd.train.weights import checkpoint_layout, named_weights
from opd.world import World

KEPT = 16
"""The most recordings whose top directions are kept for comparison; above, every other is dropped."""

Write = Callable[[int, Mapping[str, Any]], None]
"""Takes the step and the row of a recording."""


class Recorder(Protocol):
    """Measures the weights around each optimizer step; every method is collective."""

    def before_step(self, version: int) -> None:
        """Called when gradients are complete and ``version`` optimizer steps have been taken."""
        ...

    def after_step(self, version: int, *, taken: int, lr: float, norm: float) -> dict[str, float]:
        """Metrics of step ``version``, the ``taken``-th that was not skipped; ``norm`` is before clipping."""
        ...

    def state(self) -> dict[str, Any] | None:
        """What this rank's checkpoint must hold, so that the record can be resumed."""
        ...

    def resume(self, state: dict[str, Any] | None, folder: str) -> None:
        """Restore ``state``, which was read from the checkpoint ``folder``.

        Raises ValueError when the checkpoint was written without a record.
        """
        ...


class NoRecord:
    """Implements ``Recorder`` and measures nothing."""

    def before_step(self, version: int) -> None:
        """Nothing to do."""

    def after_step(self, version: int, *, taken: int, lr: float, norm: float) -> dict[str, float]:
        return {}

    def state(self) -> None:
        return None

    def resume(self, state: dict[str, Any] | None, folder: str) -> None:
        """Nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """One weight: its initial values, what is trained of it, and the rank that measures it."""

    name: str
    place: Place
    stored: Stored
    dtype: torch.dtype
    trained: torch.nn.Parameter | None
    index: torch.Tensor | None
    owner: int

    def start(self, device: torch.device) -> torch.Tensor:
        """The initial values, float32 [numel]."""
        return self.stored.read().to(device).to(self.dtype).float().reshape(-1)

    def now(self, start: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
        """The current values, float32 [numel], from the master of what is trained."""
        if self.index is None:
            return master.float().reshape(-1)
        return start.index_copy(0, self.index.long(), master.float().reshape(-1))


class WeightRecorder:
    """Implements ``Recorder`` on every weight of a causal language model, tied ones once.

    Masters and moments are gathered a layer at a time, gradients a tensor at a time. Each weight is
    measured by one rank, which keeps a bit per coordinate (whether it was changed in bf16 at any
    recording) and the top directions of up to ``KEPT`` recordings. Step 0 is recorded before the
    first step.

    Args:
        base: the initial weights by name; ValueError when one of the model's is missing.
        every, steps: steps that are multiples of ``every``, and step ``steps``, are recorded.
        adam: the optimizer whose moments are measured; None measures weights only.
        write: called on rank 0 only.
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
        self._gradient_products: dict[str, dict[str, float]] = {}
        self._seconds = 0.0

    @torch.no_grad()
    def before_step(self, version: int) -> None:
        started = time.perf_counter()
        if version == 0:
            self._record(0, None)
        if self._adam is not None and self._due(version + 1):
            self._gradient_products = dict(self._gradient_sums(version))
        self._seconds = time.perf_counter() - started

    @torch.no_grad()
    def after_step(self, version: int, *, taken: int, lr: float, norm: float) -> dict[str, float]:
        if not self._due(version):
            return {"time/record": self._seconds} if version == 1 else {}
        started = time.perf_counter()
        moments = None
        if self._adam is not None:
            clip = self._adam.max_grad_norm
            factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            moments = Moments(config=self._adam, step=taken, lr=lr, clipped=factor)
        row = self._record(version, moments)
        self._seconds += time.perf_counter() - started
        return headline(row) | {"time/record": self._seconds}

    def state(self) -> dict[str, Any]:
        return {"ever": self._ever, "tops": self._tops}

    def resume(self, state: dict[str, Any] | None, folder: str) -> None:
        if state is None:
            raise ValueError(
                f"the checkpoint {folder} was written with record=none, so what changed before it is "
                "not known: resume with record=none, or use another run.dir"
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
        """(name, ``gradient_sums``) of the trained weights that this rank measures; collective."""
        for weight, states in self._with_states(["exp_avg"] if version else []):
            if weight.trained is None:
                continue
            gradient = self._engine.full_gradient(weight.trained).reshape(-1)
            if weight.owner == self._world.rank:
                yield weight.name, gradient_sums(gradient, states[0] if states else None)

    def _with_states(self, keys: list[str]) -> Iterator[tuple[_Weight, list[torch.Tensor]]]:
        """Each weight with its optimizer states ``keys``, gathered a layer at a time; collective."""
        for _, layer in groupby(self._weights, key=lambda w: layer_key(w.name)):
            weights = list(layer)
            trained = [w.trained for w in weights if w.trained is not None]
            states = iter(self._engine.full_states(trained, keys))
            for weight in weights:
                yield weight, [] if weight.trained is None else next(states)

    def _record(self, version: int, moments: Moments | None) -> dict[str, Any]:
        """Measure every weight and write the row of step ``version``; collective."""
        earlier = sorted(self._tops)
        names = columns(earlier)
        tops: dict[str, torch.Tensor] = {}
        table: dict[str, float] = {}
        keys = ["master", *([] if moments is None else ["exp_avg", "exp_avg_sq"])]
        for number, (weight, states) in enumerate(self._with_states(keys)):
            values = dict.fromkeys(names, 0.0)
            if weight.owner == self._world.rank:
                values |= self._measure(weight, states, moments, tops)
            table |= {f"{number} {column}": values[column] for column in names}
        table = self._world.sum(table)
        places = [weight.place for weight in self._weights]
        measured = [
            {column: table[f"{number} {column}"] for column in names}
            for number in range(len(places))
        ]
        row = build_row(places, measured, moments, earlier if version == self._steps else [])
        if self._world.is_main:
            self._write(version, row)
        if version:
            self._tops[version] = tops
        if len(self._tops) > KEPT:
            self._tops = {step: self._tops[step] for step in sorted(self._tops)[::-1][::2]}
        return row

    def _measure(
        self,
        weight: _Weight,
        states: list[torch.Tensor],
        moments: Moments | None,
        tops: dict[str, torch.Tensor],
    ) -> dict[str, float]:
        """A weight's columns; ``states`` has its master and moments, if trained. Adds to ``tops``."""
        start = weight.start(self._world.device)
        now = weight.now(start, states[0]) if states else start
        values, changed = changes(start, now)
        bits = self._ever.get(weight.name)
        ever = changed if bits is None else unpacked(bits, len(changed)) | changed
        self._ever[weight.name] = packed(ever)
        values["ever"] = float(ever.sum())
        values |= self._directions(weight, start, now, tops)
        if moments is not None and states:
            products = self._gradient_products[weight.name]
            matrix = len(weight.stored.shape) > 1
            master, first, second = states
            values |= moment_sums(master, first, second, products, moments, matrix=matrix)
        return values

    def _directions(
        self,
        weight: _Weight,
        start: torch.Tensor,
        now: torch.Tensor,
        tops: dict[str, torch.Tensor],
    ) -> dict[str, float]:
        """Stable ranks of a trained matrix's difference, and its similarity to earlier recordings."""
        shape = weight.stored.shape
        if len(shape) != 2 or weight.trained is None:
            return {}
        true = top_directions((now - start).view(shape), TOP)
        visible = top_directions((now.bfloat16() - start.bfloat16()).view(shape), TOP)
        values = spectrum_values(true, visible)
        if true is None:
            return values
        for step, earlier in self._tops.items():
            if weight.name in earlier:
                values |= similarity_values(step, earlier[weight.name], true)
        # float16 halves the memory and changes a similarity by 1e-3 at most
        tops[weight.name] = true.left.half()
        return values


def _weights(causal: torch.nn.Module, base: Mapping[str, Stored], ranks: int) -> Iterator[_Weight]:
    """Every weight; the largest are assigned first, each to the rank that has least to measure."""
    compact = compact_ends(causal)
    parameters = dict(named_weights(causal))
    base = checkpoint_layout(causal).base(base)
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
        values, index = compact.get(id(parameter), (None, None))
        trained = values if values is not None else parameter if parameter.requires_grad else None
        yield _Weight(
            name=name,
            place=place(name),
            stored=base[name],
            dtype=parameter.dtype,
            trained=trained,
            index=index,
            owner=owners[name],
        )
