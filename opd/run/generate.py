"""Generates completions for the training prompts of a recipe; they become a data set."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd.assembly.rollout import in_process
from opd.config.rollout import training_sampling
from opd.config.schema import Config, problems
from opd.config.sources import data_sources
from opd.data.source_rows import numbered_rows
from opd.data.tokenizer import StudentTokenizer
from opd.evaluate.grade import grader
from opd.evaluate.reward import CompletionReward, grade_reward
from opd.run.engine import load_engine
from opd.run.model_names import resolved_model
from opd.run.recipe import Recipe
from opd.run.revisions import pinned, pinned_model
from opd.types import FinishReason, Rollout


def generate(recipe: Recipe, *, model: str | None, out: str, only_correct: bool) -> dict[str, int]:
    """Write completions of ``model`` (by default the teacher) for data.train to ``out``, as JSON lines.

    A line is the row of the prompt plus ``uid`` and ``completion``, for data.completion_field.
    Completions truncated at rollout.max_tokens are left out, because they have no end; with
    ``only_correct`` so are those that the recipe's grader finds wrong. Returns the numbers of
    generated, truncated, empty, wrong and kept completions. Raises ValueError for configuration errors.
    """
    config = pinned(recipe).config
    name = config.teacher.model if model is None else pinned_model(resolved_model(model))
    if name is None:
        raise ValueError(
            "found no model to generate with: give model=..., or teacher.model in the recipe"
        )
    config = replace(config, rollout=replace(in_process(config.rollout), on_policy=1.0))
    found = problems(config)
    if found:
        raise ValueError("\n".join(found))
    # nothing is evaluated here, so that held-out prompts need neither answers nor room
    config = replace(
        config,
        data=replace(config.data, eval=None),
        eval=replace(config.eval, kl_data=None),
    )
    rows = dict(_rows(config))
    loaded = load_engine(config, name, grades_training=only_correct)
    tokenizer = loaded.tokenizer
    sampling = replace(training_sampling(config), support_k=0)
    rollouts = loaded.engine.generate(loaded.prompts.train, sampling)
    counts = {"generated": len(rollouts), "truncated": 0, "empty": 0, "wrong": 0, "kept": 0}
    reward = _reward(config, only_correct)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with Path(out).open("w", encoding="utf-8") as file:
        for rollout in rollouts:
            if rollout.finish_reason == FinishReason.length:
                counts["truncated"] += 1
            elif len(rollout.token_ids) == 1:  # nothing but the end token
                counts["empty"] += 1
            elif reward(tokenizer.decode(rollout.token_ids.tolist()), rollout.prompt.answer) == 0:
                counts["wrong"] += 1
            else:
                counts["kept"] += 1
                file.write(json.dumps(_line(rollout, rows, tokenizer), ensure_ascii=False) + "\n")
    return counts


def _reward(config: Config, only_correct: bool) -> CompletionReward:
    if not only_correct:
        return lambda completion, answer: 1.0
    return grade_reward(grader(config.eval.grader.value, config.eval.marker))


def _rows(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """(uid, row) of the training prompts."""
    for numbered in numbered_rows(data_sources("data.train", config.data.train, config.data)):
        row = dict(numbered.row)
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(
                f"{numbered.place}: cannot be written as JSON ({error}); drop that field"
            ) from None
        yield numbered.uid, row


def _line(
    rollout: Rollout, rows: dict[str, dict[str, Any]], tokenizer: StudentTokenizer
) -> dict[str, Any]:
    uid = rollout.prompt.uid
    ids: Sequence[int] = rollout.token_ids.tolist()
    text_ids = ids[:-1] if ids[-1] in tokenizer.stop_ids else ids
    own_uid = uid if rollout.sample == 0 else f"{uid}#{rollout.sample}"
    return rows[uid] | {"uid": own_uid, "completion": tokenizer.decode_all(text_ids)}
