import json
from pathlib import Path

import pytest

from opd.config.adapter import LoraConfig
from opd.run import model_facts
from opd.run.model_facts import TABLE, read_facts

STUDENT = str(Path("recipes/quickstart/student").resolve())
COUNTS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-Math-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-27b-it": 27_432_406_640,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "agentica-org/DeepScaleR-1.5B-Preview": 1_777_088_000,
}
"""As published beside the weights; a tied head counts once."""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_facts, "hub_answers", lambda: False)
    monkeypatch.setattr(model_facts, "try_to_load_from_cache", lambda *names, revision: None)


@pytest.mark.parametrize("model", COUNTS)
def test_a_known_model_has_its_published_number_of_parameters(model: str) -> None:
    assert read_facts(model).parameters == COUNTS[model]


def test_every_shape_in_the_table_is_one_whose_parameters_are_checked() -> None:
    table = json.loads(TABLE.read_text())

    def shape(config: dict[str, object]) -> str:
        free = {"dtype", "max_position_embeddings"}
        return json.dumps({k: v for k, v in config.items() if k not in free}, sort_keys=True)

    checked = {shape(table[model]) for model in COUNTS}
    assert [model for model, config in table.items() if shape(config) not in checked] == []


def test_facts_are_those_of_the_weights_in_the_folder() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    facts = read_facts(STUDENT)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.head == model.get_output_embeddings().weight.numel()
    assert facts.embedding == model.get_input_embeddings().weight.numel()
    assert facts.tied == model.config.tie_word_embeddings
    assert facts.largest == max(p.numel() for p in model.parameters())
    assert facts.layer == sum(p.numel() for p in model.base_model.layers[0].parameters())
    heads, width = model.config.num_attention_heads, model.config.head_dim
    assert (facts.attention, facts.kv_width) == (heads * width, facts.kv_heads * width)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj"])
def test_adapters_are_as_many_as_peft_makes(targets: str) -> None:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=8, target_modules=targets)
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    wrapped = get_peft_model(
        model, PeftLoraConfig(task_type="CAUSAL_LM", r=8, target_modules=config.targets)
    )
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert read_facts(STUDENT).adapters(config) == trained


@pytest.mark.parametrize("model", ["no/such-model", "no-such-model", ".cache/not-made-yet"])
def test_an_unknown_model_is_refused_in_one_sentence(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the cache of the hub refuses names that it could not hold
    monkeypatch.setattr(model_facts, "hub_answers", lambda: False)
    with pytest.raises(ValueError, match=rf"config\.json of {model}") as error:
        read_facts(model)
    assert "\n" not in str(error.value)
    assert "give a folder that has one" in str(error.value)
