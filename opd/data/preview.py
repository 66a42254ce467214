"""The first prompt as student and teacher see it, token by token at its ends."""

from collections.abc import Iterator
from typing import Any

from opd.data.prompt_sets import PromptSets
from opd.types import IntArray

FIRST, LAST = 3, 8
"""Tokens shown of the beginning, where a bos token may be doubled, and of the end."""


def preview(prompts: PromptSets, tokenizer: Any, *, teacher: bool) -> Iterator[str]:
    """Lines that show the first training prompt: its text, then its first and last tokens by id.

    ``teacher``: whether a teacher scores; its lines follow where it sees another prompt.
    """
    prompt = prompts.train[0]
    yield from _lines(f"prompt {prompt.uid} as the student sees it", prompt.token_ids, tokenizer)
    if not teacher:
        return
    if prompt.teacher_ids is None:
        yield "the teacher sees the same tokens"
    else:
        yield from _lines(
            f"prompt {prompt.uid} as the teacher sees it", prompt.teacher_ids, tokenizer
        )


def _lines(title: str, token_ids: IntArray, tokenizer: Any) -> Iterator[str]:
    ids = token_ids.tolist()
    yield f"{title}, {len(ids)} tokens:"
    yield tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if len(ids) > FIRST + LAST:
        yield f"its first {FIRST} tokens: {_tokens(ids[:FIRST], tokenizer)}"
    last = ids[-min(LAST, len(ids)) :]
    yield f"its last {len(last)} tokens: {_tokens(last, tokenizer)}"


def _tokens(ids: list[int], tokenizer: Any) -> str:
    """``151644 '<|im_start|>'``, and so on."""
    texts = (
        tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for i in ids
    )
    return ", ".join(f"{i} {text!r}" for i, text in zip(ids, texts, strict=True))
