"""The results of benchmarks/gpu.py as tables for docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from typing import Any

GIB = 1 << 30
PHASES = ("start", "rollout", "teacher", "learn", "sync")


def page(results: Mapping[str, Any]) -> str:
    """Markdown: the machine, then a table for each part that was measured."""
    machine = dict(results["machine"])
    card = machine.pop("card", machine.pop("device"))
    machine.pop("device", None)
    words = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = [
        f"{card} ({words}); models of size {results['size']}, {results['seconds']:.0f} s in all."
    ]
    for name, rows in SECTIONS.items():
        found = {dtype: f for dtype, f in results.get(name, {}).items() if "error" not in f}
        if found:
            parts.append(f"**{TITLES[name]}**\n\n{_table(found, rows)}")
        failed = {d: f["error"] for d, f in results.get(name, {}).items() if "error" in f}
        parts += [f"{TITLES[name]}, {dtype}: {_line(error)}" for dtype, error in failed.items()]
    runs = {dtype: f for dtype, f in results.get("run", {}).items() if "error" not in f}
    parts += [_memory(dtype, found) for dtype, found in runs.items()]
    return "\n\n".join(parts) + "\n"


Row = tuple[str, Sequence[str], str]
"""What it says, where the figure is, and its format."""

TITLES = {
    "teacher": "Teacher server against transformers",
    "engine": "Engine in the rank",
    "run": "A run of a few steps",
    "resume": "Resumed against uninterrupted (quickstart)",
    "loss": "Jensen-Shannon divergence from hidden states, forward and backward",
}
SECTIONS: dict[str, Sequence[Row]] = {
    "teacher": (
        ("start, spawned workers", ("start_s",), "{:.0f} s"),
        ("gap of sampled tokens, mean", ("gap_mean",), "{:.2g} nats"),
        ("largest", ("gap_max",), "{:.2g} nats"),
        ("tokens scored, sampled", ("sampled_tokens_per_s",), "{:,.0f} /s"),
        ("tokens scored, hidden states", ("full_tokens_per_s",), "{:,.0f} /s"),
    ),
    "engine": (
        ("start", ("start_s",), "{:.0f} s"),
        ("tokens generated", ("tokens_per_s",), "{:,.0f} /s"),
        ("memory of the card, awake", ("used_awake_bytes",), "GiB"),
        ("asleep", ("used_asleep_bytes",), "GiB"),
        ("push of all weights", ("push_s",), "{:.2f} s"),
        ("gap to transformers at the start, mean", ("first_gap_mean",), "{:.2g} nats"),
        ("after a push of other weights, mean", ("gap_mean",), "{:.2g} nats"),
        ("largest", ("gap_max",), "{:.2g} nats"),
        ("what these weights moved, mean", ("moved_mean",), "{:.2g} nats"),
    ),
    "run": (
        ("step", ("steps", "step_s"), "{:.2f} s"),
        ("rollout", ("steps", "rollout_s"), "{:.2f} s"),
        ("teacher", ("steps", "teacher_s"), "{:.2f} s"),
        ("learn", ("steps", "learn_s"), "{:.2f} s"),
        ("weight sync", ("steps", "sync_s"), "{:.2f} s"),
        ("tokens generated", ("steps", "rollout_tokens_per_s"), "{:,.0f} /s"),
        ("tokens scored", ("steps", "teacher_tokens_per_s"), "{:,.0f} /s"),
        ("tokens learned from, with prompts", ("steps", "learn_tokens_per_s"), "{:,.0f} /s"),
        ("learning", ("steps", "learn_tflops"), "{:.3g} TFLOP/s"),
        ("model FLOP utilisation of learning", ("steps", "learn_mfu"), "{:.1%}"),
        ("gap of engine and learner after pushes, mean", ("gap_mean",), "{:.2g} nats"),
        ("largest", ("gap_max",), "{:.2g} nats"),
    ),
    "resume": (
        ("weights with the same bits, a second run", ("again", "equal_share"), "{:.2%}"),
        ("largest difference", ("again", "largest_difference"), "{:.2g}"),
        ("weights with the same bits, resumed", ("resumed", "equal_share"), "{:.2%}"),
        ("largest difference", ("resumed", "largest_difference"), "{:.2g}"),
    ),
    "loss": (
        ("opd, chunked", ("opd", "ms"), "{:.1f} ms"),
        ("peak above inputs and gradients", ("opd", "peak_bytes"), "GiB"),
        ("value", ("opd", "value"), "{:.6f}"),
        ("Liger, fused", ("liger", "ms"), "{:.1f} ms"),
        ("peak above inputs and gradients", ("liger", "peak_bytes"), "GiB"),
        ("value", ("liger", "value"), "{:.6f}"),
    ),
}


def _table(found: Mapping[str, Any], rows: Sequence[Row]) -> str:
    lines = [f"| | {' | '.join(found)} |", "|---|" + "---:|" * len(found)]
    for title, path, form in rows:
        cells = [_cell(_at(each, path), form) for each in found.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _at(found: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(found, dict):
            return found
        found = found.get(name)
    return found


def _cell(value: Any, form: str) -> str:
    if isinstance(value, str):
        return _line(value)
    if value is None:
        return "not measured"
    return f"{value / GIB:.2f} GiB" if form == "GiB" else form.format(value)


def _memory(dtype: str, found: Mapping[str, Any]) -> str:
    plan, peaks = found["plan"], found["peak_bytes"]
    lines = [
        f"**Peak memory of the run, {dtype}, against `opd plan`**\n",
        "| phase | measured | planned | planned / measured |",
        "|---|---:|---:|---:|",
    ]
    for phase in PHASES:
        measured = peaks[phase]
        if isinstance(plan, str) or not measured:
            cells = ("no plan", "")
        else:
            cells = (f"{plan[phase] / GIB:.2f} GiB", f"{plan[phase] / measured:.2f}")
        lines.append(f"| {phase} | {measured / GIB:.2f} GiB | {cells[0]} | {cells[1]} |")
    note = f"\n\nNo plan: {_line(plan)}" if isinstance(plan, str) else ""
    return "\n".join(lines) + note


def _line(text: str) -> str:
    """A text that fits into one cell."""
    short = " ".join(text.split()).replace("|", "/")
    return short if len(short) <= 300 else f"... {short[-300:]}"
