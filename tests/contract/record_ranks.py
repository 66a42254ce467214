"""Run by test_record.py in every rank: trains as mask_ranks.py does and records the weights.

    python record_ranks.py OUT CASE [CASE ...]      cases of mask_ranks.py, /resumed in the middle

Each case leaves its rows; on one rank also a checkpoint after every step.
"""

import json
import sys
from pathlib import Path

from mask_ranks import VOCAB, learner_of
from train_ranks import scores

from opd.world import join_world


def main(out: Path, cases: list[str]) -> None:
    from accelerate.state import AcceleratorState

    world = join_world()
    for case in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        plain, name = case.removesuffix("/resumed"), case.replace("/", "_")
        steps = int(plain.split("/")[-1])
        rows, reports = [], []

        def write(step: int, row: object, rows: list[object] = rows) -> None:
            rows.append({"step": step, "row": row})

        learner = learner_of(plain, world, write)
        for step in range(steps):
            if step == steps // 2 and case.endswith("/resumed"):
                folder = out / f"{name}_checkpoint"
                folder.mkdir(exist_ok=True)
                world.barrier()
                learner.save(str(folder))
                world.barrier()
                AcceleratorState._reset_state(reset_partial_state=True)
                learner = learner_of(plain, world, write)
                learner.load(str(folder))
            share = scores(step, VOCAB)[world.rank :: world.size]
            reports.append(learner.step(share).metrics)
            if world.size == 1:
                folder = out / f"{name}_{step + 1}"
                folder.mkdir()
                learner.save(str(folder))
        if world.is_main:
            (out / f"{name}.json").write_text(json.dumps({"rows": rows, "reports": reports}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
