"""Checks before anything expensive: one sentence for each configuration error."""

import importlib.util
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
from opd.run.attempts import Attempts, FirstError
from opd.run.devices import find_cards, needs_vllm, require_devices
from opd.run.disk import check_space
from opd.run.engine_limits import require_head_sizes
from opd.run.findings import findings
from opd.run.folder import open_folder
from opd.run.gradable import require_gradable, ungradable_answers
from opd.run.hub import hub_answers
from opd.run.hub_names import hub_names, require_cached
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

FIRST_ERROR = FirstError()


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


def check(recipe: Recipe, folder: Path, attempts: Attempts = FIRST_ERROR) -> Preflight:
    """Check settings, packages, GPUs, run folder, model, data, teacher, functions and mask, in this order.

    Raises ValueError for the first error, or, with ``attempts=EveryError()``, with a sentence for each that
    can be found without what failed. launch.processes is a number already (``resolved``).
    """
    config = recipe.config
    found = [*problems(config), *_missing_packages(config)]
    if found:
        raise ValueError("\n".join(found))
    cards = find_cards()
    attempts.make(lambda: require_devices(config, cards))
    start = attempts.make(lambda: open_folder(recipe, folder)) or 0
    if config.launch.engine == LaunchEngine.deepspeed:
        attempts.make(lambda: _require_launch_file(config))
    attempts.make(lambda: _require_functions(config))
    unseen = hub_names(config)
    if unseen and not hub_answers():
        if config.dry_run:
            attempts.require_none_failed()
            placement = place(config, cards, read_shape=lambda model: None)
            return Preflight(start=start, placement=placement, unseen=tuple(unseen))
        require_cached(unseen)
    attempts.make(lambda: require_head_sizes(config, cards))
    about_model = attempts.make(lambda: check_student_model(config)) or []
    tokenizer = attempts.make(
        lambda: read_student_tokenizer(config.student, config.data.chat_template)
    )
    attempts.make(lambda: require_mask_fits(recipe, folder))
    if tokenizer is None:
        attempts.require_none_failed()
    assert tokenizer is not None
    prompts = attempts.make(lambda: read_prompt_sets(config, tokenizer))
    if prompts is None:
        attempts.require_none_failed()
    assert prompts is not None
    return _check_prompts(recipe, folder, attempts, cards, start, tokenizer, prompts, about_model)


def _check_prompts(
    recipe: Recipe,
    folder: Path,
    attempts: Attempts,
    cards: Cards,
    start: int,
    tokenizer: StudentTokenizer,
    prompts: PromptSets,
    about_model: list[str],
) -> Preflight:
    """What needs the prompts; see ``check``."""
    config = recipe.config
    placement = attempts.make(lambda: _placed(config, cards, prompts))
    disk = attempts.make(lambda: check_space(config, folder, start))
    attempts.make(lambda: _require_enough_prompts(config, prompts))
    found = [*_adjustments(config), *about_model]
    found += attempts.make(lambda: findings(config, tokenizer, prompts)) or []
    found += ungradable_answers(config, prompts)
    transport, infos = None, []
    if has_teacher(config) and not isinstance(config.teacher, SelfTeacherConfig):
        transport, infos = attempts.make(lambda: _check_teacher(config, tokenizer, prompts)) or (
            None,
            [],
        )
    inputs = fingerprint_inputs(config, prompts, infos)
    if 0 < start < config.train.steps:
        allowed = config.run.allow_changed_inputs
        attempts.make(lambda: require_same_inputs(folder, inputs, allow_changed=allowed))
    if isinstance(config.teacher, SelfTeacherConfig):
        most = config.teacher.max_model_len or tokenizer.max_length
        attempts.make(lambda: _require_teacher_prompts_fit(prompts, most))
    attempts.make(lambda: require_gradable(config, prompts))
    attempts.make(lambda: require_servers_fit(config, tokenizer.stop_ids, prompts.max_length))
    attempts.require_none_failed()
    assert placement is not None
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


def _require_enough_prompts(config: Config, prompts: PromptSets) -> None:
    ShuffledPrompts(
        prompts.train, config.train.prompts_per_step, config.seed, groups=prompts.groups
    )
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
