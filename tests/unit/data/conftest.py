"""A byte-level tokenizer with a chat template, and files of rows."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer():
    """Makes a tokenizer of bytes with the special tokens <eos>, <|im_end|> and <bos>."""

    def make(chat_template=CHAT, **settings):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens(
            [AddedToken(token, special=True) for token in ("<eos>", "<|im_end|>", "<bos>")]
        )
        given = {"eos_token": "<eos>", "bos_token": "<bos>"} | settings
        return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat_template, **given)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Writes rows (objects, or lines as they are) to a file and returns its path."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write
