"""Make the quickstart experiment: the task, its tokenizer, a teacher and a weaker student.

The task is column addition with the steps written out. The answer to ``345+78=`` is

    5+8+0=13;4+7+1=12;3+0+1=04#423

one ``digit+digit+carry=sum`` per column from the right, then ``#`` and the result. Each column is
easy, the answer is right only if all columns are, and the carry links every column to the next.

Both models learn to write such solutions from worked examples. The teacher's examples are right.
In the student's examples each carry is forgotten with probability 0.7. The student therefore adds
every column correctly and sometimes carries, but drops most carries. On-policy distillation has to
teach it to carry, in solutions that it writes itself.

No prompt of ``eval.jsonl`` (nor the same sum with its operands exchanged) occurs in
``train.jsonl`` or in the worked examples of either model.

Run it from anywhere: ``python recipes/quickstart/make.py --out DIR``.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
DIGITS = (2, 3, 4)
MAX_NEW_TOKENS = 48
SPECIALS = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789+=;#-*/()<>.,:?! \nx"
Sum = tuple[int, int]
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Architecture and training of one of the two models; `slip` is the probability that a carry is
    forgotten in its worked examples."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    slip: float
    steps: int
    batch: int
    lr: float


TEACHER = Recipe(
    layers=3, width=192, heads=6, kv_heads=2, mlp=512, slip=0.0, steps=450, batch=96, lr=2e-3
)
STUDENT = Recipe(
    layers=2, width=128, heads=4, kv_heads=2, mlp=384, slip=0.7, steps=600, batch=96, lr=3e-3
)


def work(a: int, b: int, slip: float, rng: random.Random) -> str:
    """The written-out solution of a + b, each carry forgotten with probability `slip`; no end token."""
    steps, digits, carry, total = [], "", 0, 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        steps.append(f"{x}+{y}+{carry}={total:02d}")
        digits = f"{total % 10}{digits}"
        carry = total // 10 if rng.random() >= slip else 0
    return ";".join(steps) + f"#{total // 10 or ''}{digits}"


def draw(rng: random.Random) -> Sum:
    """Two operands, the length of each uniform over `DIGITS`."""
    a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in rng.choices(DIGITS, k=2))
    return a, b


def distinct(rng: random.Random, count: int, banned: set[Sum]) -> list[Sum]:
    """`count` different sums, none of them banned in either order."""
    found: dict[Sum, None] = {}
    while len(found) < count:
        a, b = draw(rng)
        if (a, b) not in banned and (b, a) not in found:
            found[a, b] = None
    return list(found)


def both_orders(sums: list[Sum]) -> set[Sum]:
    return {*sums, *((b, a) for a, b in sums)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; 32 in all, so that the vocabulary needs no padding."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *CHARACTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A small Qwen3: tied embeddings, heads 32 wide (the least that vLLM serves)."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=32,
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def fresh_sums(count: int, banned: set[Sum], slip: float) -> Callable[[random.Random], list[Pair]]:
    """Draw `count` prompts with their written-out solutions."""

    def batch(rng: random.Random) -> list[Pair]:
        sums: list[Sum] = []
        while len(sums) < count:
            pair = draw(rng)
            if pair not in banned:
                sums.append(pair)
        return [(f"{a}+{b}=", work(a, b, slip, rng)) for a, b in sums]

    return batch


def questions(sums: list[Sum]) -> list[Pair]:
    """Prompts with their answers."""
    return [(f"{a}+{b}=", str(a + b)) for a, b in sums]


def as_tensors(
    rows: list[Pair], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, right-padded, and labels that are -100 on the prompt and the padding."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    prompts = tokenizer([p for p, _ in rows])["input_ids"]
    answers = tokenizer([w for _, w in rows])["input_ids"]
    longest = max(len(p) + len(w) + 1 for p, w in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), -100)
    for i, (p, w) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.tensor([*p, *w, eos])
        ids[i, : len(whole)] = whole
        labels[i, len(p) : len(whole)] = whole[len(p) :]
    return ids, labels


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]
) -> float:
    """Share of prompts whose number after ``#`` is right, decoded greedily."""
    model.eval()
    right = 0
    for start in range(0, len(pairs), 256):
        part = pairs[start : start + 256]
        inputs = tokenizer([prompt for prompt, _ in part], return_tensors="pt", padding=True)
        written = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        for (_, answer), ids in zip(part, written[:, inputs["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            right += text.partition("#")[2] == answer
    model.train()
    return right / len(pairs)


def pretrain(
    name: str,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    examples: Callable[[random.Random], list[Pair]],
    probe: list[Pair],
    seed: int,
    every: int,
) -> Qwen3ForCausalLM:
    """Next-token training on fresh worked examples: AdamW, 5 % warm-up, cosine to a tenth."""
    torch.manual_seed(seed)
    rng = random.Random(f"{name} {seed}")
    model = make_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    started = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        ids, labels = as_tensors(examples(rng), tokenizer)
        loss = model(
            input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / recipe.steps)
        optimizer.param_groups[0]["lr"] = (
            recipe.lr * min(1.0, step / (0.05 * recipe.steps)) * cosine
        )
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0 or step == recipe.steps:
            print(
                f"{name} step {step:4d} loss {loss.item():.4f} "
                f"accuracy {accuracy(model, tokenizer, probe):.3f} "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return model


def write(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> Qwen3ForCausalLM:
    """Save a Hugging Face checkpoint in bfloat16, and return it as read back in float32."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write_prompts(path: Path, split: str, sums: list[Sum]) -> None:
    lines = (
        json.dumps({"uid": f"{split}-{i:05d}", "prompt": prompt, "answer": answer})
        for i, (prompt, answer) in enumerate(questions(sums))
    )
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder to write (default: that of this script)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and order")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--train-prompts", type=int, default=4096, help="prompts for distillation")
    parser.add_argument("--eval-prompts", type=int, default=256, help="held-out prompts")
    parser.add_argument("--every", type=int, default=100, help="steps between progress lines")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    tokenizer = make_tokenizer()
    rng = random.Random(arguments.seed)
    held_out = distinct(rng, arguments.eval_prompts, set())
    banned = both_orders(held_out)
    prompts = distinct(rng, arguments.train_prompts, banned)
    probe = questions(distinct(rng, 256, banned))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_prompts(arguments.out / "eval.jsonl", "eval", held_out)
    write_prompts(arguments.out / "train.jsonl", "train", prompts)
    for name, recipe in (("student", STUDENT), ("teacher", TEACHER)):
        examples = fresh_sums(recipe.batch, banned, recipe.slip)
        model = pretrain(name, recipe, tokenizer, examples, probe, arguments.seed, arguments.every)
        stored = write(model, tokenizer, arguments.out / name)
        size = sum(p.numel() for p in stored.parameters())
        print(
            f"{name}: {size:,} parameters, held-out accuracy "
            f"{accuracy(stored, tokenizer, questions(held_out)):.3f}"
        )


if __name__ == "__main__":
    main()
