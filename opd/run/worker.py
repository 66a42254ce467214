"""One training process: builds everything, runs the loop, writes what the run leaves behind."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from opd import build
from opd.cli import selfcheck
from opd.run.recipe import Composed, composed, find_recipe, run_folder
from opd.config.schema import Config
from opd.config.training import Watched
from opd.config.rules import last_step
from opd.interfaces import StudentScorer, Teacher
from opd.types import Rollout

if TYPE_CHECKING:
    import torch

    from opd.loop import Loop
    from opd.train.learner import StudentLearner
    from opd.world import World

TEACHER_ACCURACY = "OPD_TEACHER_ACCURACY"
"""Environment variable by which the launcher tells how the teacher did in the same examination."""
MISTAKE_MARK = "opd: "
"""Opens the line of a rank's log that says what the user can mend."""
SCORES = "scores.safetensors"
DONE, FAILED, MISTAKE = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """An assembled loop, where it goes on, and what to do when it is through."""

    loop: "Loop"
    start: int
    finish: Callable[[], None]


def assembled(recipe: Composed, terminal: TextIO) -> Run:
    """Build everything of this rank, from the newest checkpoint if there is one; collective.

    Raises ValueError for what the user can mend.
    """
    from opd.loop import Loop
    from opd.teacher.vocabulary import vocabulary_of
    from opd.train.checkpoints import newest_checkpoint, write_checkpoint
    from opd.world import join_world

    config, folder = recipe.config, run_folder(recipe)
    world = join_world()
    console, progress = build.build_console(world, terminal)
    text = build.build_text(
        config.student.model, trust_remote_code=config.student.trust_remote_code
    )
    prompts = build.build_prompts(config, text)
    sampling = build.sampling_of(config)
    vocabulary = vocabulary_of(text.tokenizer, text.vocab_size)
    wanted = build.wanted_of(config.loss, sampling.temperature)
    learners_model: list[torch.nn.Module] = []
    scorers = build.build_scorers(
        config,
        text,
        vocabulary,
        wanted,
        world,
        progress,
        live=lambda: learners_model[0],
    )
    if world.is_main and scorers.whole is not None:
        said = [scorers.whole.info()]
        words = build.transport_words(config.teacher, said, vocabulary, wanted, sampling)
        print(f"teacher: {words}", file=sys.stderr)
    mask = build.read_run_mask(config, folder)
    engine, sync = build.build_engine(
        config, config.student.model, text, prompts.max_length, world, progress, mask
    )
    found = newest_checkpoint(folder, processes=world.size)
    record = build.build_weight_file(config, folder, world, found)
    learner, model = build.build_learner(config, mask, scorers, text, world, progress, record)
    learners_model.append(model)
    if found is None and selfcheck.applies(config):
        alone = selfcheck.self_loss(config, text, prompts, learner, model)
        print(f"the student scored by itself: loss {alone:.2g} nats a token", file=sys.stderr)
    if found is not None:
        learner.load(str(found[0]))
        if scorers.average is not None:
            scorers.average.load(str(found[0]), found[1])
    accuracy = os.environ.get(TEACHER_ACCURACY)
    evaluator = build.build_evaluator(
        config,
        prompts,
        text,
        engine,
        world,
        teacher=scorers.sampled,
        measure=None if scorers.whole is None else divergence_measure(learner, scorers.whole),
        teacher_accuracy=None if accuracy is None else float(accuracy),
    )
    tracker = build.build_trackers(config, folder, recipe.plain, console, world, found)

    def save_state(aside: str) -> None:
        learner.save(aside)
        if scorers.average is not None and world.is_main:
            scorers.average.save(aside)

    def save(step: int) -> None:
        write_checkpoint(folder, step, save_state, keep=config.save.keep, world=world)

    def finish() -> None:
        tracker.close()
        if config.train.scores != Watched.none:
            _leave_scores(config, learner, folder, world)
        _export(learner, model, text, folder, world)

    loop = Loop(
        prompts=build.build_stream(config, prompts, rank=world.rank, size=world.size),
        engine=build.build_writer(config, engine),
        teacher=scorers.training,
        learner=learner,
        sync=build.build_hand_over(config, sync, scorers.average),
        evaluator=evaluator,
        tracker=tracker,
        verify=build.build_sync_check(config, prompts, engine, learner, world),
        save=save,
        total=world.sum,
        sampling=sampling,
        steps=last_step(config),
        eval_every=config.eval.every,
        save_every=config.save.every,
        verify_every=config.sync.verify_every,
    )
    return Run(loop=loop, start=0 if found is None else found[1], finish=finish)


def divergence_measure(
    learner: StudentScorer, teacher: Teacher
) -> Callable[[Sequence[Rollout]], dict[str, float]]:
    """Exact reverse KL of the learner to the teacher in nats per token; collective."""
    from opd.losses.divergence import Divergence
    from opd.types import DivergenceKind

    loss = Divergence(kind=DivergenceKind.reverse_kl)

    def measure(rollouts: Sequence[Rollout]) -> dict[str, float]:
        measured = learner.measure(teacher.score(rollouts), loss)
        return {"reverse_kl": measured["loss/reverse_kl"]}

    return measure


def _leave_scores(config: Config, learner: "StudentLearner", folder: Path, world: "World") -> None:
    """scores.safetensors on rank 0; every rank takes part in gathering."""
    from opd.checkpoint.writer import write_tensors
    from opd.checkpoint.tensors import open_checkpoint

    base = open_checkpoint(config.student.model)
    watched = learner.scores(config.train.scores, base)
    if world.is_main:
        write_tensors(folder / SCORES, watched, lambda: {"rule": config.train.scores.value})
    else:
        for _ in watched:
            pass
    world.barrier()


def _export(
    learner: "StudentLearner",
    model: "torch.nn.Module",
    text: build.Text,
    folder: Path,
    world: "World",
) -> None:
    """final/ on rank 0; every rank takes part in gathering."""
    from opd.tracking.report import write_report
    from opd.train.weights import export

    weights = learner.weights()
    if world.is_main:
        export(weights, model, text.tokenizer, folder / "final")
        write_report(folder)
    else:
        for _ in weights:
            pass
    world.barrier()
    world.close()


def _end_with_parent() -> None:
    """End when the launcher is gone, however it went: nobody else would notice."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(FAILED)

    threading.Thread(target=watch, daemon=True).start()


def leave_after(recipe: Composed) -> NoReturn:
    """Run this rank to its end and leave the process at once, with the status that says how it went.

    2 for the user's mistakes, 1 for anything else: after an exception nothing waits for a peer, and
    engines are not torn down politely. The terminal is ours: what libraries print goes to the log.
    """
    terminal = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        status = _run(recipe, terminal)
    except BaseException:
        traceback.print_exc()
        status = FAILED
    terminal.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(recipe: Composed, terminal: TextIO) -> int:
    try:
        run = assembled(recipe, terminal)
    except ValueError as error:
        traceback.print_exc()
        print(f"{MISTAKE_MARK}{error}", file=sys.stderr)
        return MISTAKE
    run.loop.run(run.start)
    run.finish()
    return DONE


if __name__ == "__main__":
    _end_with_parent()
    leave_after(composed(find_recipe(sys.argv[1]), sys.argv[2:]))
