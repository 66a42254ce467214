"""One training process: builds the rank, runs the loop, writes scores, final model and report."""

import faulthandler
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn, TextIO

from opd.assembly.training import Training, build_training
from opd.checkpoint.tensors import open_checkpoint
from opd.checkpoint.writer import write_tensors
from opd.config.schema import Config
from opd.config.train import MaskScores
from opd.faults import RunError
from opd.heartbeat import Heartbeat
from opd.phases import RunPhase
from opd.run.environment import TRACE_PARTS
from opd.run.launch import TEACHER_ACCURACY
from opd.run.mask import SCORES
from opd.run.recipe import Recipe, composed, find_recipe, run_folder
from opd.run.self_check import compare_at_start
from opd.run.status import DONE, FAILED, MESSAGE_MARK, USAGE_ERROR
from opd.run.stop import STOP
from opd.serving.parent import watch_parent
from opd.teacher.connect import describe_transport
from opd.teacher.vocabulary import read_vocabulary
from opd.timing import name_process, write_trace
from opd.tracking.report import write_report
from opd.train.weights import export

TRACE = "trace.json"


def run_rank(recipe: Recipe, terminal: TextIO) -> int:
    """Run this rank to its end and return its exit status; collective."""
    config, folder = recipe.config, run_folder(recipe)
    faulthandler.register(signal.SIGUSR1)  # what the launcher wants to know of a run that hangs
    name_process(f"rank {os.environ.get('RANK', '0')}")
    heartbeat = Heartbeat(folder, int(os.environ.get("RANK", "0")))
    accuracy = os.environ.get(TEACHER_ACCURACY)
    start = time.perf_counter()
    try:
        training = build_training(
            config,
            folder,
            recipe.plain,
            terminal,
            teacher_accuracy=None if accuracy is None else float(accuracy),
            stop=STOP,
            heartbeat=heartbeat,
        )
        _describe_teacher(config, training)
        print("\n".join(compare_at_start(config, training)), file=sys.stderr)
        if training.world.is_main:
            seconds = time.perf_counter() - start
            print(f"models loaded and compared: {seconds:.1f} s", file=terminal, flush=True)
    except ValueError as error:
        return _explained(error, USAGE_ERROR)
    except (RunError, OSError) as error:
        return _explained(error, FAILED)
    try:
        with STOP.handle_signals():
            STOP.finishes_step = True
            training.loop.run(training.start)
        training.loop.tracker.close()
        heartbeat.enter(RunPhase.checkpoint, training.loop.steps)
        if config.train.mask_scores != MaskScores.none:
            _write_scores(config, training, folder)
        _export(training, folder)
    except (RunError, OSError) as error:
        return _explained(error, FAILED)
    heartbeat.enter(RunPhase.done, training.loop.steps)
    if config.profile and training.world.is_main:
        write_trace(folder / TRACE_PARTS, folder / TRACE)
    return DONE


def _explained(error: Exception, status: int) -> int:
    """Log the trace of an error and mark its message for the launcher, which prints that alone."""
    traceback.print_exc()
    message = " ".join(str(error).split())
    print(f"{MESSAGE_MARK}{message}", file=sys.stderr)
    return status


def _describe_teacher(config: Config, training: Training) -> None:
    """Log how the teacher's responses are sent."""
    teacher, sampling = training.teachers.whole, training.writer.sampling
    if not training.world.is_main or teacher is None:
        return
    vocabulary = read_vocabulary(training.tokenizer.tokenizer, training.tokenizer.vocab_size)
    request = config.loss.request(sampling.temperature)
    infos = [teacher.info()]
    sent = describe_transport(config.teacher, infos, vocabulary, request, sampling.support_k)
    print(f"teacher: {sent}", file=sys.stderr)


def _write_scores(config: Config, training: Training, folder: Path) -> None:
    """Write scores.safetensors on rank 0; collective, since weights are gathered."""
    base = open_checkpoint(config.student.model)
    scores = training.learner.scores(config.train.mask_scores, base)
    if training.world.is_main:
        write_tensors(folder / SCORES, scores, lambda: {"rule": config.train.mask_scores.value})
    else:
        for _ in scores:
            pass
    training.world.barrier()


def _export(training: Training, folder: Path) -> None:
    """Write final/ and the report on rank 0; collective, since weights are gathered."""
    weights = training.learner.weights()
    if training.world.is_main:
        tokenizer = training.tokenizer
        export(
            weights,
            training.model,
            tokenizer.tokenizer,
            folder / "final",
            stop_ids=tokenizer.stop_ids,
        )
        write_report(folder)
    else:
        for _ in weights:
            pass
    training.world.barrier()
    training.world.close()


def leave_after(recipe: Recipe) -> NoReturn:
    """Run this rank to its end and exit the process at once, with the rank's status.

    The status is 2 for configuration errors and 1 for any other failure. After an exception no rank waits
    for another, and engines are not shut down in order. Output of libraries goes to the log, so that
    only the console tracker writes to the terminal.
    """
    terminal = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        status = run_rank(recipe, terminal)
    except BaseException:
        traceback.print_exc()
        status = FAILED
    terminal.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    watch_parent(lambda: os._exit(FAILED))
    leave_after(composed(find_recipe(sys.argv[1]), sys.argv[2:]))
