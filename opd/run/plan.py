"""The plan of a run: what it needs on given cards, by card and phase. Nothing is loaded or started."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from opd.config.schema import Config, problems
from opd.run.devices import resolved
from opd.run.forecast.cards import Forecast, forecast, overflows
from opd.run.forecast.changes import Saving, helpful_changes
from opd.run.forecast.engines import placed_models, scoring_model
from opd.run.forecast.gpus import cards_named, find_gpu
from opd.run.forecast.rank import Device, Models, Phase
from opd.run.forecast.seconds import (
    PhaseSeconds,
    hidden_state_bytes,
    step_seconds,
    sync_bytes,
)
from opd.run.forecast.setup import mask_densities
from opd.run.model_facts import read_facts
from opd.run.place import place
from opd.run.placement import Cards, Placement
from opd.run.recipe import load_recipe
from opd.teacher.model_info import LayerShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that `opd plan` prints. ``forecasts``: one, or one for each thing that a run trains in turn.

    ``too_small`` has a sentence for each card that is; ``seconds`` and ``sent`` are of the first forecast.
    """

    recipe: str
    cards: Cards
    forecasts: tuple[Forecast, ...]
    seconds: dict[Phase, PhaseSeconds]
    sent: dict[str, int]
    too_small: tuple[str, ...]
    changes: tuple[Saving, ...]
    prompt_tokens: int

    @property
    def bound(self) -> Phase | None:
        """The phase that takes longest."""
        return max(self.seconds, key=lambda phase: self.seconds[phase].seconds, default=None)


def plan_recipe(
    recipe: str,
    overrides: Sequence[str],
    *,
    gpu: str | None,
    gpus: int | None,
    nodes: int,
    prompt_tokens: int,
) -> Plan:
    """The plan of a recipe on the cards that are asked about (see ``chosen_cards``)."""
    processes = load_recipe(recipe, *overrides).config.launch.processes
    cards = chosen_cards(gpu, gpus, nodes, processes if isinstance(processes, int) else 1)
    return make_plan(recipe, overrides, cards=cards, prompt_tokens=prompt_tokens)


def make_plan(recipe: str, overrides: Sequence[str], *, cards: Cards, prompt_tokens: int) -> Plan:
    """The plan of a recipe on these cards. Raises ValueError with one sentence for configuration errors."""
    loaded = resolved(load_recipe(recipe, *overrides), cards, {})
    config = loaded.config
    found = problems(config)
    if found:
        raise ValueError("\n".join(found))
    models = read_models(config)
    placement = _place(config, cards, models, prompt_tokens)
    forecasts = _forecasts(config, placement, models, prompt_tokens)
    fullest = min(forecasts, key=lambda each: min(device.spare for device in each.devices))
    return Plan(
        recipe=loaded.path.stem,
        cards=cards,
        forecasts=forecasts,
        seconds=step_seconds(config, forecasts[0], placement, models),
        sent=_sent(config, forecasts[0], models),
        too_small=tuple(fits_on(config, models, prompt_tokens=prompt_tokens)(placement)),
        changes=tuple(helpful_changes(config, fullest, _again(cards, models, prompt_tokens))),
        prompt_tokens=prompt_tokens,
    )


def fits_on(
    config: Config, models: Models, *, prompt_tokens: int
) -> Callable[[Placement], list[str]]:
    """What says of a placement which cards are too small for it, as ``overflows`` does."""

    def fits(placement: Placement) -> list[str]:
        found = _forecasts(config, placement, models, prompt_tokens)
        return list(dict.fromkeys(s for each in found for s in overflows(each, placement.cards)))

    return fits


def read_models(config: Config) -> Models:
    """The sizes of the student and of every teacher that is named."""
    trusted = config.student.trust_remote_code
    student = read_facts(config.student.model, trust_remote_code=trusted)
    names = {*placed_models(config), scoring_model(config)} - {None, config.student.model}
    teachers = {name: read_facts(name) for name in sorted(filter(None, names))}
    return Models(student=student, teachers={**teachers, config.student.model: student})


def cards_there() -> Cards:
    """The GPUs of this machine; without any, its memory."""
    if not torch.cuda.is_available():
        return Cards(count=0, memory_bytes=psutil.virtual_memory().total)
    first = torch.cuda.get_device_properties(0)
    return Cards(count=torch.cuda.device_count(), memory_bytes=first.total_memory, name=first.name)


def chosen_cards(gpu: str | None, gpus: int | None, nodes: int, processes: int) -> Cards:
    """The cards that are asked about: by name, by default those that are there.

    Raises ValueError for an unknown name, and for a number without a name where no GPU is there.
    """
    if gpu is not None:
        find_gpu(gpu)
        return cards_named(gpu, processes if gpus is None else gpus, nodes)
    there = cards_there()
    if not gpus:
        return there if gpus is None else Cards(count=0, memory_bytes=psutil.virtual_memory().total)
    if not there.count:
        raise ValueError(
            f"gpus={gpus} without a name, and no GPU is here: add gpu=H100 or another name"
        )
    return Cards(count=gpus, nodes=nodes, memory_bytes=there.memory_bytes, name=there.name)


def _place(config: Config, cards: Cards, models: Models, prompt_tokens: int) -> Placement:
    """The first placement that fits; where none does, the first one, to show by how much."""

    def shape(model: str) -> LayerShape | None:
        facts = models.teachers.get(model)
        if facts is None:
            return None
        return LayerShape(
            heads=facts.heads,
            key_value_heads=facts.kv_heads,
            intermediate_size=facts.intermediate,
        )

    fits = fits_on(config, models, prompt_tokens=prompt_tokens)
    try:
        return place(config, cards, fits, read_shape=shape)
    except ValueError:
        return place(config, cards, read_shape=shape)


def _forecasts(
    config: Config, placement: Placement, models: Models, prompt_tokens: int
) -> tuple[Forecast, ...]:
    return tuple(
        forecast(
            config,
            placement,
            models,
            prompt_tokens=prompt_tokens,
            density=density,
            trains=trains if density is None else f"{trains}, density {density:g}",
        )
        for trains, density in mask_densities(config).items()
    )


def _again(cards: Cards, models: Models, prompt_tokens: int) -> Callable[[Config], Forecast | None]:
    """The fullest forecast of a changed recipe; None where it cannot be placed."""

    def again(config: Config) -> Forecast | None:
        try:
            placement = _place(config, cards, models, prompt_tokens)
        except ValueError:
            return None
        found = _forecasts(config, placement, models, prompt_tokens)
        return min(found, key=lambda each: min(device.spare for device in each.devices))

    return again


def _sent(config: Config, found: Forecast, models: Models) -> dict[str, int]:
    """Bytes by what they are."""
    sent = {
        f"a sync: {what}": size for what, size in sync_bytes(config, found, models.student).items()
    }
    if found.transport is None:
        return sent
    teacher, work = models.scoring(config), found.learner.work
    tokens = work.sequences * found.learner.ranks * config.rollout.max_tokens
    sent["a scored token"] = found.transport.bytes_per_token
    sent["scores of a step"] = tokens * found.transport.bytes_per_token
    if teacher is not None and placed_models(config):
        sent["hidden states out of the teacher's engine in a step"] = hidden_state_bytes(
            tokens, teacher
        )
    return sent


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; sizes in bytes."""
    return {
        "recipe": plan.recipe,
        "cards": {
            "name": plan.cards.name or ("CPU" if not plan.cards.count else "GPU"),
            "count": plan.cards.count,
            "nodes": plan.cards.nodes,
            "memory_bytes": plan.cards.memory_bytes,
        },
        "prompt_tokens": plan.prompt_tokens,
        "forecasts": [_forecast_json(each) for each in plan.forecasts],
        "seconds": {
            phase.value: {what: round(s, 3) for what, s in span.parts.items()}
            for phase, span in plan.seconds.items()
        },
        "bound": None if plan.bound is None else plan.bound.value,
        "sent_bytes": plan.sent,
        "fits": not plan.too_small,
        "too_small": list(plan.too_small),
        "changes": [
            {"setting": c.setting, "saves_bytes": c.saves, "spare_bytes": c.spare}
            for c in plan.changes
        ],
    }


def _forecast_json(found: Forecast) -> dict[str, Any]:
    return {
        "trains": found.trains,
        "trained": found.learner.trained,
        "host_bytes": found.host_bytes,
        "cache_tokens": found.cache_tokens,
        "devices": [_device_json(device) for device in found.devices],
    }


def _device_json(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "count": device.count,
        "holds": [short_name(each) for each in device.holds],
        "worst": device.worst.value,
        "moments": dict(device.moments),
        "spare_bytes": device.spare,
        "phases": {phase.value: dict(terms) for phase, terms in device.phases.items()},
    }


def short_name(text: str) -> str:
    """The text with the paths in it cut to their last two parts."""
    return " ".join(
        "/".join(Path(word).parts[-2:]) if word.startswith("/") else word
        for word in text.split(" ")
    )
