"""A rollout engine for one model in this process, without training: for ``opd eval`` and ``opd generate``."""

import os
import sys
from dataclasses import dataclass, replace

from opd.assembly.rollout import EngineInputs, build_engine
from opd.assembly.tracking import build_console
from opd.config.rollout import VllmRolloutConfig
from opd.config.schema import Config
from opd.data.prompt_sets import PromptSets, read_prompt_sets
from opd.data.tokenizer import StudentTokenizer, read_tokenizer
from opd.interfaces import RolloutEngine
from opd.run.gradable import require_gradable
from opd.world import World, join_world


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEngine:
    """The engine of a model, with the tokenizer and the prompts that it reads."""

    engine: RolloutEngine
    tokenizer: StudentTokenizer
    prompts: PromptSets
    world: World


def load_engine(config: Config, model: str, *, grades_training: bool = False) -> ModelEngine:
    """Load ``model`` (a folder or hub id) into the recipe's rollout engine.

    ``config.rollout`` runs in this process. Raises ValueError for prompts that cannot be read, and
    with ``grades_training`` for training prompts without answers that the grader can use.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    world = join_world()
    _, progress = build_console(world, sys.stdout)
    tokenizer = read_tokenizer(
        model,
        trust_remote_code=config.student.trust_remote_code,
        chat_template=config.data.chat_template,
    )
    prompts = read_prompt_sets(config, tokenizer, grades_training=grades_training)
    require_gradable(config, prompts, grades_training=grades_training)
    rollout = config.rollout
    if isinstance(
        rollout, VllmRolloutConfig
    ):  # nothing is pushed, and nothing else needs its memory
        rollout = replace(rollout, enable_sleep_mode=False)
    inputs = EngineInputs(
        config=replace(config, rollout=rollout),
        model=model,
        tokenizer=tokenizer,
        max_length=prompts.max_length,
        world=world,
        progress=progress,
    )
    engine, _ = build_engine(inputs)
    return ModelEngine(engine=engine, tokenizer=tokenizer, prompts=prompts, world=world)
