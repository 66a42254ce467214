"""The bytes that each token stands for, and the text that a sequence of tokens is."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of each token of a tokenizer, as it stands behind other text.

    Byte-level tokens are read by their table and ``<0x..>`` tokens as one byte, so a token may be part of
    a character. Added and special tokens are their own text. Any other token is what it adds to
    the decoding of another one, so ``_Hello`` of SentencePiece begins with a space, and so does a
    WordPiece that begins a word.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self._anchor = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"][-1:]
        self._start = self._decode(self._anchor)
        self._known: dict[int, bytes] = {}

    def __call__(self, index: int) -> bytes:
        """The bytes of one id; none for an id that is no token."""
        found = self._known.get(index)
        if found is None:
            found = self._known[index] = self._read(index)
        return found

    def is_text(self, index: int) -> bool:
        """Whether an id is a token of ordinary text, no added one."""
        return index not in self._added

    def _read(self, index: int) -> bytes:
        if index in self._added and not BYTE_TOKEN.fullmatch(self._added[index]):
            return self._added[index].encode()
        if index >= len(self._tokenizer):
            return b""
        token = self._tokenizer.convert_ids_to_tokens(index)
        if token is None:
            return b""
        if self._byte_level:
            if all(char in BYTE_LEVEL for char in token):
                return bytes(BYTE_LEVEL[char] for char in token)
            return token.encode()
        byte = BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        text = self._decode([*self._anchor, index])
        if not text.startswith(self._start):
            return self._decode([index]).encode()
        return text[len(self._start) :].encode()

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


@dataclass(frozen=True, slots=True)
class WrittenText:
    """The text of a sequence of tokens, and the byte of it at which each token ends.

    Bytes that are no UTF-8 are U+FFFD in ``text``. A token that ends inside such bytes has the end None.
    """

    text: str
    ends: list[int | None]


def written_text(pieces: Sequence[bytes], *, is_cut: bool) -> WrittenText:
    """The text of ``pieces``; ``is_cut``: a character that the last ones only begin is left out."""
    raw, parts = b"".join(pieces), []
    bad: list[tuple[int, int, int]] = []  # start and end in raw, and the end in the text
    position = length = 0
    while position < len(raw):
        try:
            parts.append(raw[position:].decode())
            break
        except UnicodeDecodeError as error:
            good = raw[position : position + error.start]
            start, end = position + error.start, position + error.end
            left_out = is_cut and end == len(raw) and error.reason == "unexpected end of data"
            mark = "" if left_out else REPLACEMENT
            parts += [good.decode(), mark]
            length += len(good) + len(mark.encode())
            # a token that ends with what is left out has no end in the text
            bad.append((start, end + left_out, length))
            position = end
    ends, at = [], 0
    for piece in pieces:
        at += len(piece)
        ends.append(_text_end(at, bad))
    return WrittenText("".join(parts), ends)


def _text_end(raw_end: int, bad: Sequence[tuple[int, int, int]]) -> int | None:
    """The byte of the text at a byte of the raw sequence; None inside bytes that are no UTF-8."""
    shift = 0
    for start, end, text_end in bad:
        if raw_end <= start:
            break
        if raw_end < end:
            return None
        shift = text_end - end
    return raw_end + shift


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """The types of the steps of a tokenizer's decoder; none where it is not of the tokenizers library."""
    if not tokenizer.is_fast:
        return set()
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    if decoder is None:
        return set()
    return {step["type"] for step in decoder.get("decoders", [decoder])}


def _byte_level_table() -> dict[str, int]:
    """The character that byte-level tokenizers (GPT-2's) write for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_LEVEL = _byte_level_table()
