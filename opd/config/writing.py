"""Who writes, on what prompts."""

from dataclasses import dataclass

from omegaconf import MISSING

from opd.config.fields import knob
from opd.config.models import DType


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Who writes, and how."""

    n: int = knob(1, least=1)
    """Completions per prompt."""
    temperature: float = knob(1.0, above=0)
    """Sampling temperature; learner and teacher are scored at the same one."""
    top_p: float = knob(1.0, above=0, most=1)
    """Nucleus sampling; below 1 the learner cannot reproduce the engine's log-probs exactly."""
    top_k: int = -1
    """Sample among the k likeliest tokens only; -1 is all of them."""
    max_tokens: int = knob(256, least=1)
    """Longest completion, in tokens."""
    dtype: DType = DType.auto
    """Number format of the engine's weights; auto is the learner's compute precision."""
    on_policy: float = knob(1.0, least=0, most=1)
    """Share of prompts that the student answers; data.completion_field answers the others."""


@dataclass(kw_only=True, slots=True)
class VllmRolloutConfig(RolloutConfig):
    """A vLLM engine inside each training process."""

    gpu_memory_fraction: float = knob(0.35, above=0, most=1)
    """Share of the GPU's memory that the engine may use."""
    kv_cache_mib: int | None = knob(None, least=1)
    """Size of the key-value cache in MiB; by default what the fraction leaves, on CPU 512."""
    max_length: int | None = knob(None, least=2)
    """Longest prompt plus completion; by default what data and rollout.max_tokens need."""
    eager: bool | None = None
    """Skip graph capture; by default true on CPU and false on CUDA."""
    sleep: bool = True
    """On CUDA, free the engine's memory while the learner works."""


@dataclass(kw_only=True, slots=True)
class ServerRolloutConfig(VllmRolloutConfig):
    """vLLM engines in processes of their own, behind HTTP; only changed weights travel."""

    urls: list[str] = knob([])
    """Addresses of running `opd rollout`; without them the run starts rollout.servers of them."""
    servers: int = knob(1, least=1)
    """How many to start with the run; rank r sends its prompts to server r modulo their number."""
    devices: str | None = None
    """GPUs of the servers started with the run, comma separated, one each; by default the run's own."""
    timeout: float = knob(600.0, above=0)
    """Seconds before one request, a whole generation included, is given up and tried again."""
    retries: int = knob(8, least=0)
    """How often a failed request is tried again, with exponential back-off; 8 are about 90 seconds."""


@dataclass(kw_only=True, slots=True)
class TransformersRolloutConfig(RolloutConfig):
    """model.generate() of transformers, for machines without vLLM."""

    batch_size: int = knob(64, least=1)
    """Sequences generated at once."""


@dataclass(kw_only=True, slots=True)
class DatasetRolloutConfig(RolloutConfig):
    """No engine: every completion is the data set's, and nothing can be examined."""

    on_policy: float = knob(0.0, least=0, most=0)
    """Share of prompts that the student answers: none."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Prompts to learn from and prompts to be examined on."""

    train: str = MISSING
    """Training prompts: a .jsonl, .json, .csv or .parquet file, or a hub data set id."""
    eval: str | None = None
    """Held-out prompts with answers, of the same kinds; without them nothing is evaluated."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of data.train when it is a hub data set."""
    eval_subset: str | None = None
    """Configuration name of data.eval; by default data.subset."""
    eval_split: str = "test"
    """Split of data.eval when it is a hub data set."""
    prompt_field: str = "prompt"
    """Column that holds the prompt: a string, or a list of {role, content} messages."""
    answer_field: str = "answer"
    """Column that holds the answer that graders compare with."""
    eval_prompt_field: str | None = None
    """The same for data.eval; by default data.prompt_field."""
    eval_answer_field: str | None = None
    """The same for data.eval; by default data.answer_field."""
    completion_field: str | None = None
    """Column that holds a whole completion, for rollout.on_policy below 1."""
    teacher_field: str | None = None
    """Column that names the teacher of a row, for teacher=pool."""
    teacher_template: str | None = None
    """What the teacher sees in the prompt's place, with fields of the row in it: {prompt}, {answer}."""
    eval_teacher_template: str | None = None
    """The same for data.eval; by default data.teacher_template."""
    teacher_system: str | None = None
    """System message that only the teacher sees, when the chat template is used."""
    teacher_chat_template: str | None = None
    """Folder or hub id whose chat template writes the teacher's prompts; by default the student's."""
    answer_regex: str | None = None
    """Regular expression whose first group is the answer, for example '#### (.*)' on GSM8K."""
    template: str | None = None
    """Text around a string prompt, with {prompt} in it."""
    chat: bool = False
    """Put string prompts into the tokenizer's chat template as the user's turn."""
    system: str | None = None
    """System message, when the chat template is used."""
    limit: int | None = knob(None, least=1)
    """Use only the first so many training prompts."""
    eval_limit: int | None = knob(None, least=1)
    """Use only the first so many held-out prompts."""
