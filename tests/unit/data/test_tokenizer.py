"""The student's tokenizer: text that tokenises back, and the tokens that end a completion."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.data.tokenizer import StudentTokenizer, read_tokenizer

TEXTS = ["x != y . z , w ?", "it 's , n't ' m ' ve !", " . x", "x  . "]


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def unigram():
    pieces = [("<unk>", 0.0), *((char, -2.0) for char in "\u2581!=.?,'xyzwitsnmve")]
    inner = Tokenizer(models.Unigram(pieces, 0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Metaspace(prepend_scheme="never")
    return inner


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("inner", [byte_level, unigram])
def test_text_tokenises_back_where_the_tokenizer_cleans_up(inner, text):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner(), eos_token="<eos>", clean_up_tokenization_spaces=True
    )
    student = StudentTokenizer(
        tokenizer=tokenizer,
        declared_stop_ids=[tokenizer.eos_token_id],
        turn_end_id=tokenizer.eos_token_id,
        pad_id=0,
        max_length=10,
        vocab_size=len(tokenizer),
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert student.decode(ids) == text
    assert student.decode_all(ids) == text
    assert student.decode([*ids, tokenizer.eos_token_id]) == text
    assert student.decode_all([*ids, tokenizer.eos_token_id]) == f"{text}<eos>"


@pytest.fixture
def model(quickstart, tmp_path):
    """The quickstart's student with a template and one more special token, <|eot|>."""

    def make(template, declared):
        folder = tmp_path / "model"
        shutil.copytree(quickstart / "student", folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 33}))
        path = folder / "generation_config.json"
        ids = tokenizer.convert_tokens_to_ids(declared)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))
        return read_tokenizer(str(folder))

    return make


def template(end):
    return f"{{% for m in messages %}}{{{{ m.content }}}}{end}\n{{% endfor %}}"


@pytest.mark.parametrize(
    ("text", "declared", "end", "stops"),
    [
        (template("<|eot|>"), ["<eos>", "<|eot|>"], "<|eot|>", ["<eos>", "<|eot|>"]),
        (template("<|eot|>"), ["<eos>"], "<|eot|>", ["<eos>", "<|eot|>"]),
        (template("<eos>"), ["<eos>", "<|eot|>"], "<eos>", ["<eos>", "<|eot|>"]),
        (template(""), ["<eos>"], "<eos>", ["<eos>"]),
        (template("{{ raise_exception('no') }}"), ["<eos>"], "<eos>", ["<eos>"]),
        (None, ["<eos>"], "<eos>", ["<eos>"]),
    ],
    ids=["gemma", "llama 3 base", "eos", "nothing", "refuses", "no template"],
)
def test_the_stop_ids_hold_the_end_of_a_turn(text, declared, end, stops, model):
    student = model(text, declared)
    names = student.tokenizer.convert_ids_to_tokens
    assert names(student.turn_end_id) == end
    assert names(student.stop_ids) == stops
    assert names(student.declared_stop_ids) == declared
    assert names(student.end_id) == "<eos>", "of plain text"
