"""Make the recipe's three prompt files from a list of facts and two public data sets.

    python recipes/smollm2/make_prompts.py --ifeval ifeval_input_data.jsonl \\
        --gsm8k-train gsm8k_train.jsonl --gsm8k-test gsm8k_test.jsonl

Each input may be plain or gzipped JSON lines, as its authors publish it. The same inputs give the
same files, byte for byte. No fact of the evaluation occurs in training, in any wording.
"""

import argparse
import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

# Categories of which the undamaged model knows most facts (the README says how they were chosen).
EVALUATED = ("capital", "landmark", "language", "opposite", "symbol")
EVALUATED_SHARE = 0.75
"""Share of the entities of each evaluated category; the others are for training."""

INSTRUCTIONS = 400
WORD_PROBLEMS = 200
HELD_OUT = {"facts": 16, "ifeval": 32, "gsm8k": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One question with a short answer; ``kind`` and ``subject`` name the entity it is about."""

    category: str
    kind: str
    subject: str
    question: str
    answer: str

    @property
    def uid(self) -> str:
        """Readable and unique."""
        return f"{self.category}-{slug(self.subject)}"


def slug(text: str) -> str:
    """Lower-case words joined by hyphens."""
    return re.sub(r"\W+", "-", text.casefold()).strip("-")


def draw(text: str) -> str:
    """A fixed pseudo-random key: sorting by it shuffles, the same way on every machine."""
    return hashlib.sha256(f"opd {text}".encode()).hexdigest()


def read_facts(path: Path) -> list[Fact]:
    """Parse ``facts.txt``; the top of that file explains the format."""
    facts: list[Fact] = []
    category = question = kind = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            category, question = line[3:].split(": ", 1)
            kind = category
        elif line.startswith("@"):
            kind = line[1:].strip()
        elif line.strip() and not line.startswith("#"):
            for pair in line.split("; "):
                subject, answer = (part.strip() for part in pair.split(" = "))
                filled = question.format(subject)
                facts.append(
                    Fact(
                        category=category,
                        kind=kind,
                        subject=subject,
                        question=re.sub(r"^\w|(?<=: )\w", lambda m: m[0].upper(), filled),
                        answer=answer,
                    )
                )
    for fact in facts:
        words = f" {slug(fact.question)} ".replace("-", " ")
        if any(f" {slug(part)} ".replace("-", " ") in words for part in fact.answer.split("|")):
            raise SystemExit(f"{path}: the question of {fact.uid} contains its answer")
    uids = [fact.uid for fact in facts]
    repeated = sorted({uid for uid in uids if uids.count(uid) > 1})
    if repeated:
        raise SystemExit(f"{path}: these facts occur twice: {', '.join(repeated)}")
    return facts


def split_facts(facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
    """Facts for evaluation and for training; an entity's facts all fall on one side.

    Facts about an evaluated entity in categories that are not evaluated are on neither side.
    """
    entities: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        if fact.category in EVALUATED:
            entities[fact.kind].add(fact.subject)
    held_back = {
        (kind, subject)
        for kind, subjects in entities.items()
        for subject in sorted(subjects, key=draw)[: round(len(subjects) * EVALUATED_SHARE)]
    }
    evaluation = [f for f in facts if f.category in EVALUATED and (f.kind, f.subject) in held_back]
    training = [f for f in facts if (f.kind, f.subject) not in held_back]
    return evaluation, training


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a JSON lines file, plain or gzipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def instructions(path: Path) -> list[dict]:
    """IFEval's short prompts, without links, one for each opening, in a shuffled order."""
    rows: dict[str, dict] = {}
    for row in read_rows(path):
        prompt = row["prompt"].strip()
        if len(prompt) <= 320 and "http" not in prompt and prompt.isascii():
            opening = slug(prompt)[:40]
            rows.setdefault(
                opening, {"uid": f"ifeval-{row['key']}", "prompt": prompt, "source": "ifeval"}
            )
    return sorted(rows.values(), key=lambda row: draw(row["uid"]))


def word_problems(path: Path, split: str, count: int) -> list[dict]:
    """``count`` short GSM8K questions; their answers are not needed."""
    rows = []
    for number, row in enumerate(read_rows(path)):
        question = row["question"].strip()
        if len(question) <= 200 and question.isascii():
            uid = f"gsm8k-{split}-{number:04d}"
            rows.append({"uid": uid, "prompt": question, "source": "gsm8k"})
    return sorted(rows, key=lambda row: draw(row["uid"]))[:count]


def fact_row(fact: Fact) -> dict:
    """One fact as a row of a prompt file."""
    return {
        "uid": fact.uid,
        "prompt": fact.question,
        "answer": fact.answer,
        "source": "facts",
    }


def write(path: Path, rows: list[dict], fields: Sequence[str]) -> None:
    """Write the rows, shuffled, keeping the named fields."""
    with path.open("w", encoding="utf-8", newline="\n") as lines:
        for row in sorted(rows, key=lambda row: draw(row["uid"])):
            kept = {field: row[field] for field in fields if field in row}
            lines.write(json.dumps(kept, ensure_ascii=False) + "\n")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    """Read the command line and write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ifeval", type=Path, required=True, help="IFEval's input_data.jsonl")
    parser.add_argument("--gsm8k-train", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--gsm8k-test", type=Path, required=True, help="GSM8K's test.jsonl")
    parser.add_argument("--facts", type=Path, default=HERE / "facts.txt", help="the list of facts")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    args = parser.parse_args()

    evaluation, training = split_facts(read_facts(args.facts))
    facts = sorted(map(fact_row, training), key=lambda row: draw(row["uid"]))
    short = instructions(args.ifeval)
    facts_held, short_held = HELD_OUT["facts"], HELD_OUT["ifeval"]
    held_out = facts[:facts_held] + short[:short_held]
    held_out += word_problems(args.gsm8k_test, "test", HELD_OUT["gsm8k"])
    train = facts[facts_held:] + short[short_held : short_held + INSTRUCTIONS]
    train += word_problems(args.gsm8k_train, "train", WORD_PROBLEMS)

    seen = {slug(row["prompt"]) for row in train}
    for row in [*map(fact_row, evaluation), *held_out]:
        assert slug(row["prompt"]) not in seen, f"{row['uid']} is also in training"
    write(args.out / "eval_facts.jsonl", [*map(fact_row, evaluation)], ("uid", "prompt", "answer"))
    write(args.out / "eval_prompts.jsonl", held_out, ("uid", "prompt", "source"))
    write(args.out / "train_prompts.jsonl", train, ("uid", "prompt", "source"))


if __name__ == "__main__":
    main()
