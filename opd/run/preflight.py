"""Checks before anything expensive: one sentence for each configuration error."""

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from opd.config.functions import load_function
from opd.config.launch import LaunchEngine, count_processes, merged_deepspeed
from opd.config.loss import FunctionLossConfig
from opd.config.mask import DiscoverMaskConfig, MaskRule, active_mask
from opd.config.optim import clipped_warmup
from opd.config.reward import GroupRewardConfig
from opd.config.rollout import training_sampling
from opd.config.schema import Config, problems
from opd.config.sources import source_paths
from opd.config.teacher import (
    PoolTeacherConfig,
    SelfTeacherConfig,
    has_teacher,
)
from opd.data.prompt_sets import PromptSets, read_prompt_sets
from opd.data.stream import ShuffledPrompts
from opd.data.tokenizer import StudentTokenizer, read_student_tokenizer
from opd.evaluate.reward import reward_function
from opd.rollout.client import require_servers_fit
from opd.run.collected_errors import CollectedErrors
from opd.run.devices import find_cards, needs_vllm, require_devices
from opd.run.disk import check_space
from opd.run.engine_limits import require_engines_run
from opd.run.findings import findings
from opd.run.folder import open_folder
from opd.run.gradable import require_gradable, ungradable_answers
from opd.run.hub import hub_answers, is_cached
from opd.run.inputs import fingerprint_inputs, require_same_inputs
from opd.run.mask import require_mask_fits
from opd.run.model_check import check_student_model
from opd.run.place import place
from opd.run.placement import Cards, Placement
from opd.run.plan import fits_on, read_models
from opd.run.recipe import Recipe
from opd.teacher.connect import describe_transport, scored_vocabulary, teacher_infos
from opd.teacher.vocabulary import read_vocabulary
from opd.types import Prompt, TeacherInfo

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What the checks found; ``start`` is the step to resume from.

    ``unseen`` names the settings whose models and data sets are on a hub that cannot be reached. A dry
    run then skips their checks and has no ``tokenizer``, ``prompts`` and ``transport`` (how the
    teacher's responses are sent). ``findings`` are likely errors; they do not stop the run. ``placement``
    says on which GPUs the processes of the run sit, ``disk`` what the run writes, ``inputs`` the
    fingerprints of what it reads.
    """

    start: int
    placement: Placement
    disk: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    tokenizer: StudentTokenizer | None = None
    prompts: PromptSets | None = None
    transport: str | None = None
    unseen: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()


def check(recipe: Recipe, folder: Path) -> Preflight:
    """Raise ValueError for the first kind of error: settings, packages, GPUs, folder, model, data, teacher.

    A dry run goes on after an error as far as it can, and the ValueError has a line for each.
    launch.processes is a number already (``resolved``).
    """
    errors = CollectedErrors(collect=recipe.config.dry_run)
    with errors.together():
        return _check(recipe, folder, errors)
    raise AssertionError("together() raises what it finds")


def _check(recipe: Recipe, folder: Path, errors: CollectedErrors) -> Preflight:
    config = recipe.config
    found = [*problems(config), *_missing_packages(config)]
    if found:
        raise ValueError("\n".join(found))
    cards = find_cards()
    require_devices(config, cards)
    start = 0
    with errors.each():
        start = open_folder(recipe, folder)
    if config.launch.engine == LaunchEngine.deepspeed:
        _require_launch_file(config)
    unseen = hub_names(config)
    if unseen and not hub_answers():
        if config.dry_run:
            placement = place(config, cards, read_shape=lambda model: None)
            return Preflight(start=start, placement=placement, unseen=tuple(unseen))
        _require_cached(unseen)
    tokenizer = read_student_tokenizer(config.student, config.data.chat_template)
    if not cards.count:
        with errors.each():
            require_engines_run(config)
    with errors.each():
        _require_functions(config)
    prompts = read_prompt_sets(config, tokenizer)
    with errors.each():
        require_gradable(config, prompts)
    placement = _placed(config, cards, prompts)
    ShuffledPrompts(
        prompts.train, config.train.prompts_per_step, config.seed, groups=prompts.groups
    )
    _require_divergence_prompts(config, prompts)
    found = [
        *_adjustments(config),
        *check_student_model(config),
        *findings(config, tokenizer, prompts),
        *ungradable_answers(config, prompts),
    ]
    disk = check_space(config, folder, start)
    transport, infos = None, []
    if has_teacher(config) and not isinstance(config.teacher, SelfTeacherConfig):
        with errors.each():
            transport, infos = _check_teacher(config, tokenizer, prompts)
    inputs = fingerprint_inputs(config, prompts, infos)
    if 0 < start < config.train.steps:
        require_same_inputs(folder, inputs, allow_changed=config.run.allow_changed_inputs)
    if isinstance(config.teacher, SelfTeacherConfig):
        _require_teacher_prompts_fit(prompts, config.teacher.max_model_len or tokenizer.max_length)
    require_mask_fits(recipe, folder)
    require_servers_fit(config, tokenizer.stop_ids, prompts.max_length)
    return Preflight(
        start=start,
        placement=placement,
        disk=disk,
        inputs=inputs,
        tokenizer=tokenizer,
        prompts=prompts,
        transport=transport,
        findings=tuple(found),
    )


def _require_divergence_prompts(config: Config, prompts: PromptSets) -> None:
    if prompts.divergence and len(prompts.divergence) < count_processes(config):
        raise ValueError(
            f"eval.kl_prompts leaves {len(prompts.divergence)} held-out prompts for "
            f"launch.processes={config.launch.processes}: give every process one, or 0"
        )


def _placed(config: Config, cards: Cards, prompts: PromptSets) -> Placement:
    """Who sits where; on GPUs the first placement that fits their memory by forecast.

    ValueError when none does, unless launch.memory_check=false.
    """
    if not (cards.count and config.launch.memory_check):
        return place(config, cards)
    prompt_tokens = max(1, prompts.max_length - config.rollout.max_tokens)
    try:
        models = read_models(config)
    except ValueError:  # unknown sizes; what cannot be read at all is reported elsewhere
        return place(config, cards)
    return place(config, cards, fits_on(config, models, prompt_tokens=prompt_tokens))


def _require_functions(config: Config) -> None:
    """ValueError when a function or class of the user's own cannot be loaded."""
    if isinstance(config.reward, GroupRewardConfig):
        reward_function(config.reward, config.eval)
    if isinstance(config.loss, FunctionLossConfig):
        load_function("loss.path", config.loss.path)
    mask = active_mask(config)
    if isinstance(mask, DiscoverMaskConfig) and mask.rule == MaskRule.function and mask.function:
        load_function("mask.function", mask.function)


def _adjustments(config: Config) -> list[str]:
    """Settings that are used with another value than the given one."""
    warmup = clipped_warmup(config)
    if warmup == config.optim.warmup_steps:
        return []
    return [
        f"optim.warmup_steps={config.optim.warmup_steps} is longer than train.steps="
        f"{config.train.steps}: {warmup} steps of warm-up are used"
    ]


def hub_names(config: Config) -> list[str]:
    """Settings that name a model or data set on a hub: owner/name, and no such local path."""
    teacher = config.teacher
    members = teacher.members if isinstance(teacher, PoolTeacherConfig) else {}
    named = [
        ("student.model", config.student.model),
        ("teacher.model", teacher.model),
        *((f"teacher.members.{name}", member) for name, member in members.items()),
        *(("data.train", path) for path in source_paths(config.data.train)),
        *(("data.eval", path) for path in source_paths(config.data.eval)),
        *(("eval.kl_data", path) for path in source_paths(config.eval.kl_data)),
    ]
    return [
        f"{setting}={name}"
        for setting, name in named
        if name and HUB_NAME.fullmatch(name) and not Path(name).exists()
    ]


def _require_cached(named: list[str]) -> None:
    """ValueError for those of ``hub_names`` of which nothing is in the caches of this machine."""
    absent = [one for one in named if not is_cached(one.partition("=")[2])]
    if absent:
        raise ValueError(
            f"{', '.join(absent)}: there is no such path in {Path.cwd()}, nothing of that name is in the "
            "cache, and the hub cannot be reached: correct the path, or download it where it can be"
        )


def _missing_packages(config: Config) -> list[str]:
    wanted = {
        "vllm": (
            needs_vllm(config),
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


def _require_launch_file(config: Config) -> None:
    merged_deepspeed(
        config.launch.deepspeed,
        zero=config.zero,
        precision=config.train.precision,
        max_grad_norm=config.optim.max_grad_norm,
    )


def _check_teacher(
    config: Config, tokenizer: StudentTokenizer, prompts: PromptSets
) -> tuple[str, list[TeacherInfo]]:
    """How the teacher's responses are sent, and the infos of the teachers.

    ValueError when a teacher does not fit student or prompts.
    """
    student = scored_vocabulary(
        config.teacher, read_vocabulary(tokenizer.tokenizer, tokenizer.vocab_size)
    )
    if isinstance(config.teacher, PoolTeacherConfig):
        every_prompt = chain(prompts.train, prompts.eval, prompts.divergence)
        _require_members(config.teacher, every_prompt)
    longest = prompts.teacher_max_length
    infos = teacher_infos(config.teacher, student)
    for info in infos:
        if longest > info.max_length:
            raise ValueError(
                f"prompt plus completion can reach {longest} tokens, the teacher {info.model} takes "
                f"at most {info.max_length}: lower rollout.max_tokens or drop long prompts"
            )
    sampling = training_sampling(config)
    request = config.loss.request(sampling.temperature)
    return describe_transport(config.teacher, infos, student, request, sampling.support_k), infos


def _require_teacher_prompts_fit(prompts: PromptSets, max_length: int) -> None:
    if prompts.teacher_max_length > max_length:
        raise ValueError(
            f"the teacher's prompt plus completion can reach {prompts.teacher_max_length} tokens, and "
            f"the student, who is the teacher, takes at most {max_length}: shorten data.teacher_template or "
            "lower rollout.max_tokens"
        )


def _require_members(pool: PoolTeacherConfig, prompts: Iterable[Prompt]) -> None:
    for prompt in prompts:
        if prompt.teacher not in pool.members:
            found = "no teacher" if prompt.teacher is None else f"teacher {prompt.teacher!r}"
            raise ValueError(
                f"prompt {prompt.uid} names {found}, teacher.members has "
                f"{', '.join(sorted(pool.members))}: give every prompt the name of a member"
            )
