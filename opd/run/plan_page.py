"""The plan of a run as tables for the terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.run.forecast.cards import Forecast
from opd.run.forecast.gpus import GIB
from opd.run.forecast.rank import Device, Phase
from opd.run.plan import Plan, short_name

LEAST_SHOWN = GIB // 200
"""Smaller figures would be printed as 0.00."""


def print_plan(plan: Plan, console: Console) -> None:
    """Memory by card and phase, bytes, seconds, whether it fits, and what to change."""
    for found in plan.forecasts:
        for device in found.devices:
            console.print(_memory(plan, found, device))
            console.print()
    for line in _sentences(plan):
        console.print(line, highlight=False, soft_wrap=False)
    if plan.seconds:
        console.print()
        console.print(_seconds(plan))
    if plan.changes:
        console.print()
        console.print(_changes(plan))
    console.print()
    for line in _assumptions(plan):
        console.print(line, style="dim", highlight=False)


def _memory(plan: Plan, found: Forecast, device: Device) -> Table:
    """One column a phase, in GiB."""
    holds = ", ".join(short_name(each) for each in device.holds) or "nothing"
    trains = f"; trains {found.trains}" if len(plan.forecasts) > 1 else ""
    table = Table(title=f"{device.name}: {holds}{trains}; GiB", title_justify="left", box=None)
    table.add_column("", no_wrap=False)
    for phase in Phase:
        table.add_column(phase.value, justify="right")
    names = dict.fromkeys(name for terms in device.phases.values() for name in terms)
    for name in names:
        sizes = [device.phases[phase].get(name, 0) for phase in Phase]
        if max(sizes) >= LEAST_SHOWN:
            table.add_row(name, *(_gib(size) if size >= LEAST_SHOWN else "" for size in sizes))
    table.add_section()
    table.add_row("together", *(_gib(device.total(phase)) for phase in Phase), style="bold")
    if device.memory_bytes and plan.cards.count:
        spare = [device.memory_bytes - device.total(phase) for phase in Phase]
        table.add_row(
            f"free of {_gib(device.memory_bytes)}",
            *(Text(_gib(s), style="red" if s < 0 else "") for s in spare),
        )
    return table


def _sentences(plan: Plan) -> Iterator[str | Text]:
    if plan.too_small:
        yield Text("does not fit", style="bold")
        yield from (f"- {sentence}" for sentence in plan.too_small)
    elif any(device.memory_bytes for found in plan.forecasts for device in found.devices):
        yield Text.assemble(("fits", "bold"), f": {_room(plan)}")
    for found in plan.forecasts:
        if not plan.cards.count:
            continue
        yield f"memory of the machine{_which(plan, found)}: {_gib(found.host_bytes)} GiB"
        if found.cache_tokens:
            yield (
                f"rollout engine: a cache of {found.cache_tokens:,} tokens, "
                f"{found.cache_tokens / found.learner.work.width:.1f} whole sequences"
            )
    for what, size in plan.sent.items():
        yield f"bytes of {what}: {_size(size)}"


def _room(plan: Plan) -> str:
    """What stays free where it is tightest."""
    if not plan.cards.count:
        needed = max(found.host_bytes for found in plan.forecasts)
        return (
            f"{_gib(needed)} of {_gib(plan.cards.memory_bytes)} GiB of the machine, "
            f"{_gib(plan.cards.memory_bytes - needed)} stay free"
        )
    device = min(
        (device for found in plan.forecasts for device in found.devices), key=lambda d: d.spare
    )
    return (
        f"{device.name} is the fullest, {_gib(device.spare)} of {_gib(device.memory_bytes)} GiB stay free "
        f"in the phase {device.worst}"
    )


def _which(plan: Plan, found: Forecast) -> str:
    return f" ({found.trains})" if len(plan.forecasts) > 1 else ""


def _seconds(plan: Plan) -> Table:
    table = Table(
        title=f"seconds of a step on {plan.cards.count} x {plan.cards.name}, at the stated rates",
        title_justify="left",
        box=None,
    )
    table.add_column("")
    table.add_column("s", justify="right")
    table.add_column("of which")
    for phase, span in plan.seconds.items():
        parts = sorted(span.parts.items(), key=lambda item: -item[1])
        text = ", ".join(f"{what} {seconds:.1f}" for what, seconds in parts if seconds >= 0.05)
        table.add_row(phase.value, _seconds_text(span.seconds), text)
    table.add_section()
    assert plan.bound is not None
    bound = plan.seconds[plan.bound]
    total = sum(span.seconds for span in plan.seconds.values())
    reason = f"bound: {plan.bound}, {bound.seconds / total:.0%} of the step, by {bound.bound}"
    table.add_row("together", f"{total:.1f}", reason, style="bold")
    return table


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 0.05 else "<0.1"


def _changes(plan: Plan) -> Table:
    title = "what to change, each alone" if plan.too_small else "what would save memory, each alone"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("setting")
    table.add_column("saves GiB", justify="right")
    table.add_column("then free", justify="right")
    for change in plan.changes:
        table.add_row(change.setting, _gib(change.saves), _gib(change.spare))
    return table


def _assumptions(plan: Plan) -> Iterator[str]:
    work = plan.forecasts[0].learner.work
    yield (
        f"Every sequence is taken to be {work.width} tokens long, {plan.prompt_tokens} of them the prompt "
        f"(prompt_tokens=...); micro-batches of {work.rows}, {work.micro_batches} of them a step and rank."
    )
    moments = plan.forecasts[0].devices[0].moments
    if moments:
        listed = ", ".join(f"{name} {_gib(size)}" for name, size in moments.items())
        yield f"A step adds, at its moments ({listed} GiB), what is shown under learn: the largest."
    if plan.cards.count:
        yield "No figure was measured on a GPU. docs/plan.md has every formula and what is left out."


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _size(size: int) -> str:
    if size < 1_000_000:
        return f"{size:,}"
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
