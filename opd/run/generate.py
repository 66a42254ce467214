"""``opd write``: a model answers a recipe's training prompts; the answers become a data set."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from opd import build
from opd.run.recipe import Composed
from opd.config.schema import Config
from opd.config.rules import problems
from opd.types import FinishReason, Rollout


def write(recipe: Composed, *, model: str | None, out: str, right_only: bool) -> dict[str, int]:
    """Completions of ``model`` (by default the teacher) for data.train, one JSON line each, in ``out``.

    A line is the row it came from with ``uid`` and ``completion``, for data.completion_field. What was
    cut at rollout.max_tokens is left out, since it never ended; with ``right_only`` so is what the
    recipe's grader finds wrong. Returns how many were written, cut, empty, wrong and kept. Raises
    ValueError for the user's mistakes.
    """
    config = recipe.config
    chosen = model or config.teacher.model
    if chosen is None:
        raise ValueError("nobody is named to write: give --model, or teacher.model in the recipe")
    config = replace(config, rollout=replace(build.in_process(config.rollout), on_policy=1.0))
    found = problems(config)
    if found:
        raise ValueError("\n".join(found))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rows = {str(row.get("uid", i)): row for i, row in enumerate(_rows(config))}
    text, rollouts = _written(config, chosen)
    counts = {"written": len(rollouts), "cut": 0, "empty": 0, "wrong": 0, "kept": 0}
    judge = _judge(config, right_only)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with Path(out).open("w") as file:
        for rollout in rollouts:
            if rollout.finish_reason == FinishReason.length:
                counts["cut"] += 1
            elif len(rollout.token_ids) == 1:  # an end and nothing before it
                counts["empty"] += 1
            elif judge(text.decode(rollout.token_ids.tolist()), rollout.prompt.answer) == 0:
                counts["wrong"] += 1
            else:
                counts["kept"] += 1
                file.write(json.dumps(_line(rollout, rows, text), ensure_ascii=False) + "\n")
    return counts


def _written(config: Config, model: str) -> tuple[build.Text, list[Rollout]]:
    from opd.world import join_world

    world = join_world()
    _, progress = build.build_console(world, sys.stdout)
    text = build.build_text(model, trust_remote_code=config.student.trust_remote_code)
    prompts = build.build_prompts(config, text)
    engine, _ = build.build_engine(config, model, text, prompts.max_length, world, progress)
    sampling = replace(build.sampling_of(config), support_k=0)
    return text, engine.generate(prompts.train, sampling)


def _judge(config: Config, right_only: bool) -> Any:
    from opd.evaluate.grade import grader
    from opd.evaluate.reward import graded

    if not right_only:
        return lambda completion, answer: 1.0
    return graded(grader(config.eval.grader.value, config.eval.marker))


def _rows(config: Config) -> Iterator[dict[str, Any]]:
    from opd.data.rows import read_rows

    data = config.data
    rows = read_rows(data.train, split=data.split, subset=data.subset)
    for place, row in islice(rows, data.limit):
        try:
            json.dumps(dict(row))
        except TypeError as error:
            raise ValueError(
                f"{place}: cannot be written as JSON ({error}); drop that field"
            ) from None
        yield dict(row)


def _line(rollout: Rollout, rows: dict[str, dict[str, Any]], text: build.Text) -> dict[str, Any]:
    uid = rollout.prompt.uid
    ids: Sequence[int] = rollout.token_ids.tolist()
    said = ids[:-1] if ids[-1] in text.stop_ids else ids
    own = uid if rollout.sample == 0 else f"{uid}#{rollout.sample}"
    return rows[uid] | {"uid": own, "completion": text.tokenizer.decode(said)}
