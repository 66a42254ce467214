"""What a family must do under vLLM: trained densely and with a mask, exported, loaded again, analysed.

    python -m tests.families.check OUT FAMILY [FAMILY ...]

checks families one after the other in this process. Each leaves a folder with ``result.json`` in OUT.
"""

import gc
import io
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from opd.analysis.formatting import Spectrum
from opd.analysis.summary import summarize
from opd.analysis.walk import AnalysisInputs, measure_checkpoints
from opd.assembly.training import build_training
from opd.checkpoint.chunks import quiet
from opd.checkpoint.tensors import open_checkpoint
from opd.config.mask import MaskRule, RuleConfig
from opd.mask.discover import discover_mask
from opd.mask.file import RUN_MASK
from opd.mask.mask import Mask
from opd.reference import load_whole, reference_logps
from opd.run.recipe import load_recipe
from opd.run.self_check import compare_at_start
from opd.sync.verify import SyncMismatch
from opd.timing import timed
from opd.train.weights import export
from opd.types import Rollout, Sampling
from tests.families.models import FAMILIES, build
from tests.support.results import finish_case, partial_folder

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
OVERRIDES = (
    "teacher=local",
    f"teacher.model={QUICKSTART / 'teacher'}",
    "rollout.kv_cache_memory_bytes=67108864",
    "rollout.max_tokens=16",
    "launch.processes=1",
    "launch.engine=torch",
    "train.steps=2",
    "train.prompts_per_step=4",
    "optim.lr=1e-3",
    "data.eval=null",
    "save.every=0",
    "sync.verify_every=1",
)
RESULT = "result.json"
GREEDY = Sampling(n=1, temperature=0.0, max_tokens=12)


def set_environment() -> None:
    """What a run sets for its processes, with one thread each."""
    for name in ("OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def check(name: str, work: Path) -> dict[str, Any]:
    """The result of one family: figures, seconds, and for a failure the stage and the error.

    The student of the masked run is what the dense run has exported.
    """
    base, dense, masked = work / "base", work / "dense", work / "masked"
    found: dict[str, Any] = {"family": name, "stage": "build"}
    seconds: dict[str, float] = {}
    settings = FAMILIES[name].overrides
    try:
        build(name, base, QUICKSTART / "student")
        with timed(seconds, "dense"):
            found["stage"] = "dense"
            outputs, figures = _train(base, dense, settings)
            found["dense"] = figures
        with timed(seconds, "analyze"):
            found["stage"] = "analyze"
            found["analyze"] = _analysed(base, dense / "final", work / "analysis")
        with timed(seconds, "masked"):
            found["stage"] = "masked"
            mask = _mask(dense / "final", masked)
            again, figures = _train(dense / "final", masked, settings, mask)
            found["masked"] = figures
            found["moved"] = _moved(dense / "final", masked / "final", mask)
            found["reload"] = _differences(dense / "final", outputs, again)
        found["status"] = "green"
    except Exception as error:
        known = isinstance(error, ValueError | SyncMismatch)
        found |= {"status": "refused" if known else "failed"}
        message = str(error).replace(str(work), name)
        found |= {"error": f"{type(error).__name__}: {message}", "trace": traceback.format_exc()}
    finally:
        _forget_engines()
    found["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    return found


def _train(
    model: Path, folder: Path, settings: tuple[str, ...], mask: Mask | None = None
) -> tuple[dict[str, list[Rollout]], dict[str, float]]:
    """Two steps and the export: greedy completions before and after, and the gaps that the run compares."""
    overrides = [f"student.model={model}", f"run.dir={folder}", *OVERRIDES, *settings]
    folder.mkdir(parents=True, exist_ok=True)
    if mask is not None:
        overrides += ["mask=file", f"mask.path={folder / RUN_MASK}"]
    recipe = load_recipe("quickstart", *overrides)
    training = build_training(recipe.config, folder, recipe.plain, io.StringIO(), None)
    engine, prompts = training.writer.engine, training.prompts.train[:4]
    outputs = {"loaded": engine.generate(prompts, GREEDY)}
    lines = compare_at_start(recipe.config, training)
    training.loop.run(training.start)
    outputs["trained"] = engine.generate(prompts, GREEDY)
    training.loop.tracker.close()
    export(
        training.learner.weights(),
        training.model,
        training.tokenizer.tokenizer,
        folder / "final",
        stop_ids=training.tokenizer.stop_ids,
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return outputs, {
        "self": float(lines[1].split()[-4]),
        "push_gap": float(lines[2].split()[-2]),
        "sync_gap": max(row["sync/gap"] for row in rows),
        "step_gap": max(row["engine/logp_gap"] for row in rows[1:]),
    }


def _forget_engines() -> None:
    """Leave vLLM's groups of processes: a family with experts needs others than one without."""
    gc.collect()
    cleanup_dist_env_and_memory()


def _differences(
    folder: Path, before: dict[str, list[Rollout]], after: dict[str, list[Rollout]]
) -> dict[str, float]:
    """Of the export in a new engine: to the engine that was trained, and to transformers, in nats."""
    causal = load_whole(str(folder), "the export", dtype=torch.float32)
    trained, loaded = before["trained"], after["loaded"]
    own = []
    for rollout in loaded:
        logp_TV = reference_logps(causal, rollout.sequence)[len(rollout.prompt.token_ids) - 1 :]
        ids = torch.from_numpy(rollout.token_ids.astype(np.int64))[:, None]
        own.append(np.abs(logp_TV.gather(1, ids)[:, 0].numpy() - rollout.logps).max())
    assert [r.token_ids.tolist() for r in trained] == [r.token_ids.tolist() for r in loaded]
    to_trained = [np.abs(a.logps - b.logps).max() for a, b in zip(trained, loaded, strict=True)]
    return {"engine": float(max(to_trained)), "transformers": float(max(own))}


def _analysed(base: Path, trained: Path, out: Path) -> dict[str, float]:
    """Tensors that opd analyze measures and leaves out, and the share of weights that did not change."""
    inputs = AnalysisInputs(
        base=str(base), trained=str(trained), other=None, spectrum=Spectrum.fast
    )
    summary = summarize(measure_checkpoints(inputs, out, quiet))
    trainable = open_checkpoint(str(base)).parameters
    left_out = sum(name in trainable for name in summary["tensors"]["left_out"])
    return {"left_out": left_out, "unchanged": summary["paper"]["exact_zero"]}


def _mask(base: Path, folder: Path) -> Mask:
    folder.mkdir(parents=True, exist_ok=True)
    rule = RuleConfig(rule=MaskRule.random, density=0.2, seed=1)
    discover_mask(open_checkpoint(str(base)), rule, folder / RUN_MASK)
    return Mask.read(folder / RUN_MASK)


def _moved(base: Path, trained: Path, mask: Mask) -> dict[str, int]:
    """How many frozen and kept coordinates have other bits than before."""
    before, after = open_checkpoint(str(base)), open_checkpoint(str(trained))
    assert set(before) == set(after), sorted(set(before) ^ set(after))[:4]
    frozen = kept = 0
    for name in before:
        moved = (before[name].read() != after[name].read()).flatten()
        index = mask.indices.get(name)
        kept += 0 if index is None else int(moved[index.long()].sum())
        if index is not None:
            moved[index.long()] = False
        frozen += int(moved.sum())
    return {"frozen_moved": frozen, "kept_moved": kept}


def main(out: Path, names: list[str]) -> None:
    for name in names:
        partial = partial_folder(out, name)
        shutil.rmtree(partial, ignore_errors=True)
        found = check(name, partial)
        if found["status"] != "green":
            print(found.pop("trace", ""), file=sys.stderr)
        (partial / RESULT).write_text(json.dumps(found, indent=1))
        finish_case(out, name)


if __name__ == "__main__":
    set_environment()
    main(Path(sys.argv[1]), sys.argv[2:])
    # at once, as a worker of a run leaves: after gloo an interpreter may abort at its exit
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
