"""Make the teacher of the cross-tokenizer experiment: the quickstart's task in pieces of several characters.

The student of ``cross_tokenizer_quickstart`` is the quickstart's, with one token for each character. This
teacher has learned the same additions with a tokenizer of its own: a byte-level BPE, trained on the
same prompts and worked examples, whose tokens are pieces such as ``+0=`` or ``=13;``. A token of one is
therefore rarely a token of the other, and an id never means the same.

Prompts and held-out sums are the quickstart's files. No held-out sum, in either order, was seen by the
teacher.

Run it from the repository: ``python -m recipes.cross_tokenizer.make --out DIR``.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipes.quickstart import make as quickstart
from recipes.quickstart.make import Sum

HERE = Path(__file__).resolve().parent
MERGES = 64
TEACHER = replace(quickstart.TEACHER, steps=700)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: padding and end token, the 256 bytes, ``MERGES`` merges learned from ``texts``."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|pad|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + len(alphabet) + MERGES,
        special_tokens=specials,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def read_sums(path: Path) -> list[Sum]:
    """The operands of every prompt of a file of the quickstart."""
    prompts = (json.loads(line)["prompt"] for line in path.read_text().splitlines())
    pairs = (prompt.rstrip("=").split("+") for prompt in prompts)
    return [(int(a), int(b)) for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder to write (default: that of this script)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--every", type=int, default=50, help="steps between progress lines")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    held_out = read_sums(quickstart.HERE / "eval.jsonl")
    banned = quickstart.both_orders(held_out)
    prompts = read_sums(quickstart.HERE / "train.jsonl")
    rng = random.Random(arguments.seed)
    worked = [quickstart.work(a, b, TEACHER.slip, rng) for a, b in prompts]
    tokenizer = make_tokenizer([*(p for p, _ in quickstart.questions(prompts)), *worked])
    examples = quickstart.fresh_sums(TEACHER.batch, banned, TEACHER.slip)
    probe = quickstart.questions(prompts[:256])
    model = quickstart.pretrain(
        "teacher", TEACHER, tokenizer, examples, probe, arguments.seed, arguments.every
    )
    stored = quickstart.write(model, tokenizer, arguments.out / "teacher")
    size = sum(p.numel() for p in stored.parameters())
    share = quickstart.accuracy(stored, tokenizer, quickstart.questions(held_out))
    print(f"teacher: {size:,} parameters, held-out accuracy {share:.3f}")


if __name__ == "__main__":
    main()
