"""The end of a turn in the chat templates of families, shortened: what stands behind an answer."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.data.chat import end_of_turn

EACH = "{% for m in messages %}"
FAMILIES = {
    "Gemma 2": (
        EACH
        + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}",
        ("<start_of_turn>", "<end_of_turn>", "<eos>"),
        "<end_of_turn>",
    ),
    "Llama 3": (
        EACH + "{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m.role }}"
        "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|eot_id|>",
    ),
    "Qwen": (
        EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        "<|im_end|>",
    ),
    "Mistral": (
        EACH
        + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content + eos_token }}"
        "{% endif %}{% endfor %}",
        ("[INST]", "[/INST]", "</s>"),
        "</s>",
    ),
    "Llama 2": (
        EACH + "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% else %} "
        "{{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
        ("</s>",),
        "</s>",
    ),
    "Phi 3": (
        EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|end|>",
    ),
    "gpt-oss": (
        EACH + "<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}",
        ("<|start|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|return|>",
    ),
    "Command R7B": (
        EACH + "<|START_OF_TURN_TOKEN|><|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% else %}{{ m.content }}{% endif %}"
        "<|END_OF_TURN_TOKEN|>{% endfor %}",
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
            "<|END_OF_TURN_TOKEN|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "GLM 4": (
        "[gMASK]<sop>" + EACH + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}",
        ("[gMASK]", "<sop>", "<|assistant|>", "<|user|>"),
        "<|user|>",
    ),
}
"""Template, special tokens (the last one is the tokenizer's eos), end of a turn."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_is_the_family_s(family):
    template, special, end = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True) for name in ("<bos>", *special)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=template, bos_token="<bos>", eos_token=special[-1]
    )
    found = end_of_turn(tokenizer, [tokenizer.eos_token_id])
    assert found is not None
    assert tokenizer.convert_ids_to_tokens(found) == end
