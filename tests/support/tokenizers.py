"""Small tokenizers of different kinds over one text, and random strings of many scripts."""

import json
import random
from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "def add(a, b):\n    return a + b  # 12 + 30 = 42\n",
    "The capital of France is Paris, and the answer is 42.",
    "Grüße aus Köln! Ein Café, naïve façade; cafe\u0301 nai\u0308ve.",
    "1+3+0=04;4+5+0=09#94 10,000.50 3.14159",
    "日本語のテキストと한국어, عربى, हिन्दी, ไทย.",
    "emoji 😀😃 👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 end",
    "  two  spaces\tand\ttabs \r\n newlines\n\n\n",
]
ALPHABET = [
    *"abcdefgh XYZ",
    *"0123456789+-=;#(){}[]<>_.,:?!'\"\\",
    *" \t\n\r\u00a0\u3000\u2009",
    *"äöüßéñçøåÅ",
    *"\u0301\u0308\u0327\u20dd\u0e34\u093f",
    *"日本語中文한국어عربيहिन्दไทย",
    *"😀👩\u200d👧🇩🇪🏳\ufe0f🏽",
    *"\u2581Ġ\ufffd\u0000\u00ad\ufb01ⅧK",
    *"αβγЖдё∀∑√",
]
WORDS = [
    "return",
    "the",
    " answer",
    "  ",
    "\n\n",
    "+0=",
    "caf\u0065\u0301",
    "👩\u200d👩\u200d👧\u200d👦",
    " 42",
]


def random_text(rng: random.Random) -> str:
    """Up to 40 characters, letters and words of many scripts mixed."""
    parts = rng.choices([*ALPHABET, *WORDS], k=rng.randrange(0, 24))
    return "".join(parts)


def _finished(raw: Tokenizer, *, end: str = "</s>") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=end,
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


SPECIALS = ["<unk>", "</s>", "<pad>"]


def characters() -> PreTrainedTokenizerFast:
    """One token per character, unknown ones as <unk>: the quickstart's kind."""
    known = [chr(code) for code in range(32, 127)] + list("\n\täöüß日本語")
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *known])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return _finished(raw)


def byte_level(merges: int = 150, *, use_regex: bool = True) -> PreTrainedTokenizerFast:
    """GPT-2's kind: tokens are bytes and may be parts of a character."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIALS) + 256 + merges,
        special_tokens=SPECIALS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    return _finished(raw)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama's kind: spaces as a mark, a space in front of a text, and <0x..> for unknown characters."""
    spaces = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    trainer = trainers.BpeTrainer(vocab_size=160, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    raw = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    raw.normalizer = spaces
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _finished(raw)


def unigram() -> PreTrainedTokenizerFast:
    """T5's and XLM-R's kind: a normalizer (NFKC), a mark for spaces, unknown characters fused to <unk>."""
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return _finished(raw)


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, accents and white space are lost."""
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=SPECIALS, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return _finished(raw)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "characters": characters,
    "byte_level": byte_level,
    "byte_level_unsplit": lambda: byte_level(260, use_regex=False),
    "byte_fallback": byte_fallback,
    "unigram": unigram,
    "word_pieces": word_pieces,
}
