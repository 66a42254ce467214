"""Make the consolidation experiment: a second skill, its teacher, and a student weak at both skills.

The first skill is the quickstart's column addition, and its teacher is the quickstart's. The second
is column subtraction, written out in the same way. The answer to ``345-78=`` is

    5-8-0=17;4-7-1=16;3-0-1=02#267

one ``digit-digit-borrow=`` per column from the right, each followed by the borrow from the next
column and the digit that is left; then ``#`` and the result, with as many digits as the first
number. The first number is never smaller than the second.

The subtraction teacher was trained on right subtractions only. The student was trained on both
skills, half and half, with each carry or borrow forgotten with probability 0.7.

The pairs of numbers are the quickstart's, each used as a sum and as a difference. No prompt of
``eval.jsonl`` (nor the same sum with its operands exchanged) occurs in ``train.jsonl`` or in the
worked examples of any of the models.

Run it from the repository: ``python -m recipes.consolidate_quickstart.make --out DIR``.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from recipes.quickstart import make as quickstart
from recipes.quickstart.make import Pair, Sum

HERE = Path(__file__).resolve().parent
TEACHER = quickstart.TEACHER
STUDENT = replace(quickstart.STUDENT, steps=700)


def work(a: int, b: int, slip: float, rng: random.Random) -> str:
    """The written-out solution of a - b, each borrow forgotten with probability `slip`; no end token."""
    steps, digits, borrow = [], "", 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10, b // 10**place % 10
        left = x - y - borrow
        steps.append(f"{x}-{y}-{borrow}={int(left < 0)}{left % 10}")
        digits = f"{left % 10}{digits}"
        borrow = int(left < 0 and rng.random() >= slip)
    return ";".join(steps) + f"#{digits}"


def ordered(pair: Sum) -> Sum:
    """The larger number first."""
    return max(pair), min(pair)


def fresh_differences(
    count: int, banned: set[Sum], slip: float
) -> Callable[[random.Random], list[Pair]]:
    """Draw `count` prompts with their written-out solutions; `banned` has pairs in both orders."""

    def batch(rng: random.Random) -> list[Pair]:
        pairs: list[Sum] = []
        while len(pairs) < count:
            pair = ordered(quickstart.draw(rng))
            if pair not in banned:
                pairs.append(pair)
        return [(f"{a}-{b}=", work(a, b, slip, rng)) for a, b in pairs]

    return batch


def questions(pairs: list[Sum]) -> list[Pair]:
    """Prompts with their answers."""
    return [(f"{a}-{b}=", f"{a - b:0{len(str(a))}d}") for a, b in pairs]


def read(path: Path, count: int) -> dict[str, list[Pair]]:
    """The first `count` sums of a file of the quickstart, and the differences of the same numbers."""
    sums: list[Sum] = []
    for line in path.read_text().splitlines()[:count]:
        a, _, b = json.loads(line)["prompt"].rstrip("=").partition("+")
        sums.append((int(a), int(b)))
    return {
        "addition": quickstart.questions(sums),
        "subtraction": questions([ordered(pair) for pair in sums]),
    }


def write_prompts(path: Path, split: str, skills: dict[str, list[Pair]]) -> None:
    """Rows of all skills, alternating; each names the teacher of its skill."""
    turns = zip(*([(name, *pair) for pair in pairs] for name, pairs in skills.items()), strict=True)
    rows = [row for turn in turns for row in turn]
    lines = (
        json.dumps({"uid": f"{split}-{i:05d}", "teacher": name, "prompt": prompt, "answer": answer})
        for i, (name, prompt, answer) in enumerate(rows)
    )
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder to write (default: that of this script)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights and order (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--train-prompts", type=int, default=2048, help="prompts of each skill")
    parser.add_argument(
        "--eval-prompts", type=int, default=256, help="held-out prompts of each skill"
    )
    parser.add_argument("--every", type=int, default=50, help="steps between progress lines")
    parser.add_argument("--only", choices=("teacher", "student"), help="train one of the two")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    tokenizer = quickstart.make_tokenizer()
    held_out = read(quickstart.HERE / "eval.jsonl", arguments.eval_prompts)
    prompts = read(quickstart.HERE / "train.jsonl", arguments.train_prompts)
    banned = quickstart.both_orders(
        [(int(a), int(b)) for a, b in (p[:-1].split("+") for p, _ in held_out["addition"])]
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_prompts(arguments.out / "eval.jsonl", "eval", held_out)
    write_prompts(arguments.out / "train.jsonl", "train", prompts)
    probe = {name: pairs[:128] for name, pairs in prompts.items()}

    def both(rng: random.Random) -> list[Pair]:
        half = STUDENT.batch // 2
        return [
            *quickstart.fresh_sums(half, banned, STUDENT.slip)(rng),
            *fresh_differences(half, banned, STUDENT.slip)(rng),
        ]

    right = fresh_differences(TEACHER.batch, banned, TEACHER.slip)
    for name, recipe, examples, probed in (
        ("teacher", TEACHER, right, probe["subtraction"]),
        ("student", STUDENT, both, [*probe["addition"], *probe["subtraction"]]),
    ):
        if arguments.only not in (None, name):
            continue
        model = quickstart.pretrain(
            name, recipe, tokenizer, examples, probed, arguments.seed, arguments.every
        )
        stored = quickstart.write(model, tokenizer, arguments.out / name)
        size = sum(p.numel() for p in stored.parameters())
        for skill, pairs in held_out.items():
            share = quickstart.accuracy(stored, tokenizer, pairs)
            print(f"{name}: {size:,} parameters, held-out accuracy in {skill} {share:.3f}")


if __name__ == "__main__":
    main()
