"""Everything that can be known before anything expensive: one sentence for each mistake."""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from opd import build
from opd.run.recipe import Composed
from opd.run.findings import findings
from opd.run.folder import open_folder
from opd.run.mask import require_mask_fits
from opd.config.schema import Config
from opd.config.masks import DiscoverMaskConfig, FileMaskConfig
from opd.config.models import LocalTeacherConfig, LoraConfig, PoolTeacherConfig, SelfTeacherConfig, ServerTeacherConfig
from opd.config.rewards import MeasuredRewardConfig
from opd.config.writing import RolloutConfig, ServerRolloutConfig, VllmRolloutConfig
from opd.config.training import LaunchEngine
from opd.config.rules import active_mask, has_teacher, problems
from opd.types import Prompt

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the checks found out on their way; ``start`` is the step to go on from.

    ``unseen`` names what lies on a hub that cannot be reached; a dry run checks around it, and then
    there are no ``text``, ``prompts`` and ``transport`` (how the teacher's answers travel).
    """

    start: int
    text: build.Text | None = None
    prompts: build.Prompts | None = None
    transport: str | None = None
    unseen: tuple[str, ...] = ()
    noticed: tuple[str, ...] = ()


def check(composed: Composed, folder: Path) -> Checked:
    """Raise ValueError for the first kind of mistake: settings, packages, folder, model, data, teacher."""
    config = composed.config
    found = [*problems(config), *_missing_packages(config)]
    if found:
        raise ValueError("\n".join(found))
    start = open_folder(composed, folder)
    if config.launch.engine == LaunchEngine.deepspeed:
        _launch_file_is_sound(config)
    unseen = hub_names(config)
    if unseen and config.dry_run and not hub_answers():
        return Checked(start=start, unseen=tuple(unseen))
    text = build.build_text(
        config.student.model, trust_remote_code=config.student.trust_remote_code
    )
    prompts = build.build_prompts(config, text)
    build.build_stream(config, prompts, rank=0, size=1)
    if prompts.divergence and len(prompts.divergence) < config.launch.processes:
        raise ValueError(
            f"eval.kl_prompts leaves {len(prompts.divergence)} held-out prompts for "
            f"launch.processes={config.launch.processes}: give every process one, or 0"
        )
    noticed = findings(config, text, prompts)
    transport = None
    if has_teacher(config) and not isinstance(config.teacher, SelfTeacherConfig):
        transport = _fitting_transport(config, text, prompts)
    if isinstance(config.teacher, SelfTeacherConfig):
        _teachers_prompts_fit(prompts, config.teacher.max_length or text.max_length)
    if isinstance(config.reward, MeasuredRewardConfig):
        build.build_reward(config)
    require_mask_fits(composed, folder)
    build.require_rollout_servers(config, text, prompts.max_length)
    return Checked(
        start=start, text=text, prompts=prompts, transport=transport, noticed=tuple(noticed)
    )


def hub_names(config: Config) -> list[str]:
    """Settings that name something on a hub: owner/name, and no such path here."""
    teacher = config.teacher
    members = teacher.members if isinstance(teacher, PoolTeacherConfig) else {}
    named = {
        "student.model": config.student.model,
        "teacher.model": teacher.model,
        **{f"teacher.members.{name}": member for name, member in members.items()},
        "data.train": config.data.train,
        "data.eval": config.data.eval,
        "eval.kl_data": config.eval.kl_data,
    }
    return [
        f"{setting}={name}"
        for setting, name in named.items()
        if name and HUB_NAME.fullmatch(name) and not Path(name).exists()
    ]


def hub_answers() -> bool:
    """Whether the hub can be reached now; asked once, for a few seconds at most."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=5)
    except httpx.HTTPError:
        return False
    return True


def _missing_packages(config: Config) -> list[str]:
    wanted = {
        "vllm": (
            (
                isinstance(config.rollout, VllmRolloutConfig)
                and not (isinstance(config.rollout, ServerRolloutConfig) and config.rollout.urls)
            )
            or _starts_vllm_teachers(config),
            "install it (README), or use rollout=transformers with teacher=local",
        ),
        "deepspeed": (
            config.launch.engine == LaunchEngine.deepspeed,
            "install it (README), or use launch.engine=torch",
        ),
    }
    return [
        f"the package {name} is not installed and this run needs it: {remedy}"
        for name, (needed, remedy) in wanted.items()
        if needed and importlib.util.find_spec(name) is None
    ]


def _starts_vllm_teachers(config: Config) -> bool:
    match config.teacher:
        case ServerTeacherConfig(url=None, backend="vllm"):
            return True
        case PoolTeacherConfig(members=members, backend="vllm"):
            return bool(build.pool_models(members))
    return False


def _launch_file_is_sound(config: Config) -> None:
    from opd.train.engine import merged_deepspeed

    merged_deepspeed(
        config.launch.deepspeed,
        zero=config.zero,
        precision=config.train.precision,
        clip=config.optim.clip,
    )


def _fitting_transport(config: Config, text: build.Text, prompts: build.Prompts) -> str:
    """How the answers will travel; ValueError when a teacher does not fit student or prompts."""
    from opd.teacher.vocabulary import vocabulary_of

    student = vocabulary_of(text.tokenizer, text.vocab_size)
    if isinstance(config.teacher, PoolTeacherConfig):
        read = [*prompts.train, *prompts.eval, *prompts.divergence]
        _members_are_named(config.teacher, read)
    longest = prompts.teacher_max_length
    infos = build.teacher_infos(config.teacher, student)
    for info in infos:
        if longest > info.max_length:
            raise ValueError(
                f"prompt plus completion can reach {longest} tokens, the teacher {info.model} takes "
                f"at most {info.max_length}: lower rollout.max_tokens or drop long prompts"
            )
    sampling = build.sampling_of(config)
    wanted = build.wanted_of(config.loss, sampling.temperature)
    return build.transport_words(config.teacher, infos, student, wanted, sampling)


def _teachers_prompts_fit(prompts: build.Prompts, most: int) -> None:
    if prompts.teacher_max_length > most:
        raise ValueError(
            f"the teacher's prompt plus completion can reach {prompts.teacher_max_length} tokens, and "
            f"the student, who is the teacher, takes at most {most}: shorten data.teacher_template or "
            "lower rollout.max_tokens"
        )


def _members_are_named(pool: PoolTeacherConfig, prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if prompt.teacher not in pool.members:
            found = "no teacher" if prompt.teacher is None else f"teacher {prompt.teacher!r}"
            raise ValueError(
                f"prompt {prompt.uid} names {found}, teacher.members has "
                f"{', '.join(sorted(pool.members))}: give every prompt the name of a member"
            )


def plan_table(composed: Composed, checked: Checked, folder: Path) -> Table:
    """What the run is going to do, for ``dry_run`` and ``opd doctor``."""
    config, table = composed.config, Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rollout: RolloutConfig = config.rollout
    rows = {
        "student": config.student.model,
        "teacher": _teacher_words(config),
        "method": f"{config.method}: loss {composed.choices['loss']}, "
        f"reward {composed.choices['reward']}",
        "writes": _writer_words(config),
        "optimizer": f"{composed.choices['optim']}, lr {config.optim.lr:g}, ZeRO {config.zero}, "
        f"{config.train.precision.value}, adapter {composed.choices['adapter']}",
        "learns": _mask_words(config),
        "step": f"{config.train.prompts_per_step} prompts x {rollout.n} completions of at most "
        f"{rollout.max_tokens} tokens, by {config.launch.processes} process(es)",
        "steps": f"{config.train.steps}, going on from {checked.start}",
        "folder": str(folder),
    }
    if checked.prompts is not None and checked.text is not None:
        rows["prompts"] = (
            f"{len(checked.prompts.train)} to learn from, {len(checked.prompts.eval)} held out, "
            f"{len(checked.prompts.divergence)} for the divergence"
        )
        rows["longest"] = f"{checked.prompts.max_length} tokens of {checked.text.max_length}"
    if checked.transport is not None:
        rows["transport"] = checked.transport
    for finding in checked.noticed:
        rows.setdefault("look at", "")
        rows["look at"] += f"- {finding}\n"
    if checked.unseen:
        rows["not checked"] = f"{', '.join(checked.unseen)}: the hub cannot be reached"
    for name, words in rows.items():
        table.add_row(name, words)
    return table


def _mask_words(config: Config) -> str:
    match active_mask(config):
        case FileMaskConfig(path=path, training=training):
            return f"the mask {path}, {training}"
        case DiscoverMaskConfig() as mask:
            kept = f"density {mask.density:g}" if mask.density else f"threshold {mask.threshold}"
            return f"a mask by rule {mask.rule}, {kept if mask.like is None else mask.like}"
    return "adapters" if isinstance(config.adapter, LoraConfig) else "every weight"


def _teacher_words(config: Config) -> str:
    match config.teacher:
        case ServerTeacherConfig(url=str(url)):
            return f"the server at {url}"
        case ServerTeacherConfig(model=model, backend=backend):
            return f"{model}, served by {backend}, started with the run"
        case PoolTeacherConfig(members=members):
            return ", ".join(f"{name}: {member}" for name, member in members.items())
        case SelfTeacherConfig(weights=weights):
            return f"the student itself, {weights}"
        case LocalTeacherConfig(model=model) if model:
            return f"{model}, inside each training process"
    return "none"


def _writer_words(config: Config) -> str:
    share = config.rollout.on_policy
    if share == 1:
        return "the student"
    read = f"{config.data.train}, column {config.data.completion_field}"
    return read if share == 0 else f"the student {share:.0%}, {read} the rest"
