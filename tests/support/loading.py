"""One rank of a learner built from a recipe; each case leaves its weights and the reports of its steps.

    python -m tests.support.loading OUT CASE [CASE ...]

learner   learner/HOW/zero/precision/adapter/mask   the quickstart's student, 3 steps on fixed scores
memory    memory/HOW/zero                           loads a model of ``PARAMETERS``

``HOW`` is recipe, as runs load it, or whole: everything in float32 on every rank, for comparison.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.assembly import model as assembly
from opd.assembly.learner import build_learner
from opd.assembly.teacher import no_teachers
from opd.config.mask import FileMaskConfig, MaskTraining
from opd.config.schema import Config
from opd.data.tokenizer import read_student_tokenizer
from opd.mask.mask import Mask
from opd.run.recipe import load_recipe
from opd.tracking.console import SilentProgress
from opd.train.weights import load_student
from opd.world import World, join_world
from tests.support.learners import DENSITY, QUICKSTART_VOCAB, fixed_scores, quickstart_student
from tests.support.results import REPORTS, WEIGHTS, finish_case, partial_folder

PEAK = "peak.json"
STEPS = 3
PROBE = list(range(3, 20))
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10}
SHARED = "model"
"""The folder beside the cases where the model of the memory cases lies."""


def main(out: Path, cases: list[str]) -> None:
    """Run cases one after the other; collective."""
    world = join_world()
    for name in cases:
        folder = partial_folder(out, name)
        if world.is_main:
            folder.mkdir()
        world.barrier()
        kind, _, rest = name.partition("/")
        {"learner": run_learner, "memory": run_memory}[kind](rest, folder, out, world)
        world.barrier()
        if world.is_main:
            finish_case(out, name)
        world.barrier()


def run_learner(name: str, folder: Path, out: Path, world: World) -> None:
    """Train, and leave weights and metrics."""
    AcceleratorState._reset_state(reset_partial_state=True)
    how, zero, precision, adapter, masked = name.split("/")
    config = load_recipe(
        "quickstart", f"zero={zero}", f"train.precision={precision}", f"adapter={adapter}"
    ).config
    mask = None
    if masked != "dense":
        mask = quickstart_mask()
        config = replace(config, mask=FileMaskConfig(path="kept", training=MaskTraining(masked)))
    torch.manual_seed(0)  # adapters
    tokenizer = read_student_tokenizer(config.student)
    with loaded_whole(how == "whole"):
        model, parameter_mask, own = assembly.build_model(config, mask, world, PROBE)
    learner, _ = build_learner(
        config, model, parameter_mask, no_teachers(tokenizer, world), tokenizer, world,
        SilentProgress(), lambda step, row: None, own,
    )  # fmt: skip
    reports = []
    for step in range(STEPS):
        share = fixed_scores(step, QUICKSTART_VOCAB)[world.rank :: world.size]
        reports.append(learner.step(share).metrics)
    left = {n: t.to("cpu", copy=True).contiguous() for n, t in learner.weights()}
    if world.is_main:
        save_file(left, folder / WEIGHTS)
        (folder / REPORTS).write_text(json.dumps(reports))


@contextmanager
def loaded_whole(wanted: bool) -> Iterator[None]:
    """Inside, the assembly loads every model whole and in float32, where ``wanted``."""
    before = assembly._load

    def load(config: Config, mask: Mask | None, world: World) -> torch.nn.Module:
        return load_student(config.student.model, config.student, dtype=torch.float32)

    if wanted:
        assembly._load = load
    try:
        yield
    finally:
        assembly._load = before


def run_memory(name: str, folder: Path, out: Path, world: World) -> None:
    """Load a model, and leave the peak of private memory over what there was before, of each rank."""
    how, zero = name.split("/")
    overrides = [f"zero={zero}", "train.precision=bf16"]
    small = load_recipe("quickstart", *overrides).config
    assembly._load(small, None, world)  # libraries are loaded and set up
    config = load_recipe("quickstart", *overrides, f"student.model={out / SHARED}").config
    with loaded_whole(how == "whole"), peak_memory() as peak:
        model = assembly._load(config, None, world)
    (folder / f"{world.rank}.{PEAK}").write_text(json.dumps(peak()))
    del model


def save_model(out: Path) -> int:
    """Write the model of the memory cases, in bf16; the number of its parameters."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8192, num_attention_heads=8, num_key_value_heads=8, head_dim=64, **SIZES
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out / SHARED)
    return sum(p.numel() for p in model.parameters())


@contextmanager
def peak_memory() -> Iterator[Any]:
    """Yields a function: the most anonymous resident bytes since the start, above those at the start.

    Pages of mapped files are left out: the system drops them when memory is short.
    """
    done, start = threading.Event(), _anonymous()
    most = [start]

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], _anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most[0] - start
    finally:
        done.set()
        thread.join()


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("Linux reports RssAnon")


def quickstart_mask() -> Mask:
    """A fifth of every tensor of the quickstart's student."""
    from opd.mask.file import Origin
    from opd.train.weights import named_weights

    generator = torch.Generator().manual_seed(1)
    weights = {name: weight.detach() for name, weight in named_weights(quickstart_student())}
    indices = {
        name: torch.randperm(w.numel(), generator=generator)[: round(DENSITY * w.numel())]
        .sort()
        .values.int()
        for name, w in weights.items()
    }
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    return Mask(indices=indices, shapes=shapes, origin=Origin(rule="test", base="", model="tiny"))


if __name__ == "__main__":
    status = 0
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
