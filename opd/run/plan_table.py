"""The plan of a run as a table, for ``dry_run`` and ``opd doctor``."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from opd.config.adapter import LoraConfig
from opd.config.launch import count_processes
from opd.config.mask import DiscoverMaskConfig, FileMaskConfig, active_mask
from opd.config.rollout import RolloutConfig
from opd.config.schema import Config
from opd.config.sources import source_paths
from opd.config.teacher import (
    LocalTeacherConfig,
    PoolTeacherConfig,
    SelfTeacherConfig,
    ServerTeacherConfig,
)
from opd.run.placement import Placement
from opd.run.preflight import Preflight
from opd.run.recipe import Recipe


def plan_table(recipe: Recipe, checked: Preflight, folder: Path) -> Table:
    """Who generates, who scores, what is trained, from which step, in which folder; and the findings."""
    config, table = recipe.config, Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rollout: RolloutConfig = config.rollout
    rows = {
        "student": config.student.model,
        "teacher": _teacher(config),
        "method": f"{config.method}: loss {recipe.choices['loss']}, "
        f"reward {recipe.choices['reward']}",
        "generates": _writer(config),
        "optimizer": f"{recipe.choices['optim']}, lr {config.optim.lr:g}, ZeRO {config.zero}, "
        f"{config.train.precision.value}, adapter {recipe.choices['adapter']}",
        "trains": _trained(config),
        "step": f"{config.train.prompts_per_step} prompts x {rollout.n} completions of at most "
        f"{rollout.max_tokens} tokens, by {count_processes(config)} process(es)",
        "placement": describe_placement(checked.placement),
        "steps": f"{config.train.steps}, starting from step {checked.start}",
        "folder": str(folder),
    }
    if checked.disk is not None:
        rows["disk"] = checked.disk
    if checked.prompts is not None and checked.tokenizer is not None:
        rows["prompts"] = (
            f"{len(checked.prompts.train)} to learn from, {len(checked.prompts.eval)} held out, "
            f"{len(checked.prompts.divergence)} for the divergence"
        )
        rows["longest"] = f"{checked.prompts.max_length} tokens of {checked.tokenizer.max_length}"
    if checked.transport is not None:
        rows["transport"] = checked.transport
    for finding in checked.findings:
        rows.setdefault("findings", "")
        rows["findings"] += f"- {finding}\n"
    if checked.unseen:
        rows["not checked"] = f"{', '.join(checked.unseen)}: the hub cannot be reached"
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def describe_placement(placement: Placement) -> str:
    """Who sits where, in a few words."""
    cards, ranks = placement.cards, placement.rank_cards
    if not cards.count:
        servers = [
            f"{len(those)} {kind} server(s)"
            for kind, those in (
                ("teacher", placement.teachers),
                ("rollout", placement.rollout_servers),
            )
            if those
        ]
        return ", ".join([f"{len(placement.ranks)} process(es) on the CPU", *servers])
    memory = f", {cards.memory_bytes >> 30} GiB" if cards.memory_bytes else ""
    nodes = f"{cards.nodes} machines of " if cards.nodes > 1 else ""
    engine = f", each with an engine ({placement.engine_utilization:g} of it)"
    lines = [
        f"{nodes}{cards.count} GPU(s){f' {cards.name}' if cards.name else ''}{memory}",
        f"process(es) on GPU {_listed(placement, ranks)}"
        f"{engine if placement.engine_utilization else ''}",
        *(
            f"{kind} {server.model} on GPU {_listed(placement, server.cards)} "
            f"({server.gpu_memory_utilization:g} of it)"
            for kind, servers in (
                ("teacher", placement.teachers),
                ("rollout server of", placement.rollout_servers),
            )
            for server in servers
        ),
    ]
    return "\n".join(lines)


def _listed(placement: Placement, cards: Sequence[int]) -> str:
    return ", ".join(map(placement.cards.identity, cards))


def _trained(config: Config) -> str:
    match active_mask(config):
        case FileMaskConfig(path=path, training=training):
            return f"the mask {path}, {training}"
        case DiscoverMaskConfig() as mask:
            kept = f"density {mask.density:g}" if mask.density else f"threshold {mask.threshold}"
            return f"a mask by rule {mask.rule}, {kept if mask.like is None else mask.like}"
    return "adapters" if isinstance(config.adapter, LoraConfig) else "every weight"


def _teacher(config: Config) -> str:
    match config.teacher:
        case ServerTeacherConfig(url=str(url)):
            return f"served at {url}"
        case ServerTeacherConfig(model=model, backend=backend, replicas=replicas):
            times = f" {replicas} times" if replicas > 1 else ""
            return f"{model}, served by {backend}{times}, started with the run"
        case PoolTeacherConfig(members=members):
            return ", ".join(f"{name}: {member}" for name, member in members.items())
        case SelfTeacherConfig(weights=weights):
            return f"the student itself, {weights}"
        case LocalTeacherConfig(model=model) if model:
            return f"{model}, inside each training process"
    return "none"


def _writer(config: Config) -> str:
    share = config.rollout.on_policy
    if share == 1:
        return "the student"
    field = config.data.completion_field
    place = "the assistant's last turns" if field is None else f"column {field}"
    column = f"{', '.join(source_paths(config.data.train))}, {place}"
    return column if share == 0 else f"the student {share:.0%}, the rest from {column}"
