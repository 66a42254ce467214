"""Config -> objects: the only place that chooses a class."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from opd.config import (
    AdamWConfig,
    Config,
    DataConfig,
    DiscoverMaskConfig,
    DivergenceLossConfig,
    DType,
    FileMaskConfig,
    LocalTeacherConfig,
    LoraConfig,
    LossConfig,
    MaskConfig,
    MaskTraining,
    PolicyGradientLossConfig,
    Precision,
    RolloutConfig,
    ServerRolloutConfig,
    ServerTeacherConfig,
    Support,
    TeacherConfig,
    TrainingEngine,
    TransformersRolloutConfig,
    VllmRolloutConfig,
    WandbConfig,
    Watched,
    WeightRecordConfig,
    active_mask,
)
from opd.interfaces import (
    Evaluator,
    Loss,
    Progress,
    PromptStream,
    Reader,
    RolloutEngine,
    Teacher,
    Tracker,
    WeightSync,
)
from opd.types import Prompt, Rollout, Sampling, TeacherInfo, Wanted

if TYPE_CHECKING:
    import torch

    from opd.mask.mask import Mask
    from opd.rollout.app import Hosted
    from opd.rollout.options import RolloutServerOptions
    from opd.service.client import ServiceClient
    from opd.sync.sparse import Load
    from opd.sync.verify import SyncCheck
    from opd.teacher.options import TeacherServerOptions
    from opd.teacher.vocabulary import Vocabulary
    from opd.train.confine import Confinement
    from opd.train.engine import TrainingEngine as Engine
    from opd.train.learner import StudentLearner
    from opd.train.record import Recorder, Write
    from opd.train.student import Student
    from opd.world import World

TEACHER_URL = "OPD_TEACHER_URL"
"""Environment variable by which a launcher tells where the teacher that it started is."""
ROLLOUT_URLS = "OPD_ROLLOUT_URLS"
"""The same of the rollout servers that it started, comma separated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A tokenizer and what the student's folder says about tokens and lengths.

    ``stop_ids`` end a completion; ``max_length`` is the model's context in tokens;
    ``vocab_size`` counts the rows of its embedding.
    """

    tokenizer: Any
    stop_ids: list[int]
    pad_id: int
    max_length: int
    vocab_size: int

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What the run learns from and is examined on; each list fits the model's context."""

    train: list[Prompt]
    eval: list[Prompt]
    divergence: list[Prompt]
    max_length: int
    """Longest prompt plus completion that can occur, in tokens."""


def build_text(model: str, *, trust_remote_code: bool) -> Text:
    """Read tokenizer and configs of a model folder or hub id.

    Raises ValueError when there is no such model, or no end token.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"student.model={model} cannot be read as a model folder or hub id ({first})"
        ) from None
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    listed = ends if isinstance(ends, list) else [ends]
    stop_ids = sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None})
    if not stop_ids:
        raise ValueError(
            f"student.model={model} names no end token: set eos_token in its tokenizer"
        )
    text = config.get_text_config()
    pad_id = tokenizer.pad_token_id
    return Text(
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        pad_id=stop_ids[0] if pad_id is None else pad_id,
        max_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
    )


def build_prompts(config: Config, text: Text) -> Prompts:
    """Load and tokenise every prompt. Raises ValueError naming file and line of what is wrong."""
    data, longest = config.data, text.max_length
    if isinstance(config.rollout, VllmRolloutConfig) and config.rollout.max_length:
        longest = min(longest, config.rollout.max_length)
    written = config.rollout.max_tokens
    answered = config.eval.max_tokens or written
    train = _read(data, text, data.train, longest - written, held_out=False)
    held_out: list[Prompt] = []
    if data.eval is not None:
        held_out = _read(data, text, data.eval, longest - max(answered, written), held_out=True)
    divergence = held_out
    if config.eval.kl_data is not None:
        divergence = _read(data, text, config.eval.kl_data, longest - written, held_out=True)
    lengths = [len(p.token_ids) for p in [*train, *held_out, *divergence]]
    return Prompts(
        train=train,
        eval=held_out,
        divergence=divergence[: config.eval.kl_prompts],
        max_length=min(longest, max(lengths) + max(written, answered)),
    )


def _read(data: DataConfig, text: Text, source: str, room: int, *, held_out: bool) -> list[Prompt]:
    from opd.data.prompts import load_prompts

    if room < 1:
        raise ValueError(
            f"rollout.max_tokens leaves no room for a prompt in the model's context of "
            f"{text.max_length} tokens: lower it"
        )
    return load_prompts(
        source,
        text.tokenizer,
        prompt_field=(data.eval_prompt_field if held_out else None) or data.prompt_field,
        answer_field=(data.eval_answer_field if held_out else None) or data.answer_field,
        answer_regex=data.answer_regex,
        template=data.template,
        split=data.eval_split if held_out else data.split,
        subset=(data.eval_subset if held_out else None) or data.subset,
        chat_template=data.chat,
        system=data.system,
        limit=data.eval_limit if held_out else data.limit,
        max_prompt_tokens=room,
    )


def build_loss(config: LossConfig) -> Loss:
    """The pure function that the learner minimises."""
    from opd.losses import Divergence, PolicyGradient

    match config:
        case DivergenceLossConfig():
            return Divergence(kind=config.kind, beta=config.beta, skew=config.skew)
        case PolicyGradientLossConfig():
            return PolicyGradient(
                importance=config.importance,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                cap=config.cap,
                band_low=config.band_low,
                band_high=config.band_high,
                advantage_clip=config.advantage_clip,
            )
    raise AssertionError(f"no loss for {type(config).__name__}")


def wanted_of(loss: LossConfig, temperature: float) -> Wanted:
    """What the teacher must say for this loss."""
    match loss:
        case DivergenceLossConfig(support=Support.full):
            return Wanted(full=True, temperature=temperature)
        case DivergenceLossConfig(support=support, k=k):
            return Wanted(
                top_k=0 if support == Support.student_top_k else k,
                rollout_support=support != Support.teacher_top_k,
                temperature=temperature,
            )
    return Wanted(temperature=temperature)


def sampling_of(config: Config) -> Sampling:
    """How training rollouts are drawn; a support of the student's needs its ids from the engine."""
    support_k = 0
    if isinstance(config.loss, DivergenceLossConfig) and config.loss.support in (
        Support.student_top_k,
        Support.union,
    ):
        support_k = config.loss.k
    return Sampling(
        n=config.rollout.n,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_tokens=config.rollout.max_tokens,
        seed=config.seed,
        support_k=support_k,
    )


def build_teacher(
    config: TeacherConfig,
    student: "Vocabulary",
    wanted: Sequence[Wanted],
    world: "World",
    progress: Progress,
) -> list[Teacher]:
    """One teacher behind as many clients as there are things to ask; ValueError if it does not fit."""
    match config:
        case ServerTeacherConfig():
            from opd.teacher.client import ServerTeacher
            from opd.teacher.options import TOKEN_VARIABLE

            url = config.url or os.environ.get(TEACHER_URL)
            assert url is not None, "the launcher starts a teacher where no url is given"
            return [
                ServerTeacher(
                    url,
                    wanted=want,
                    student=student,
                    token=os.environ.get(TOKEN_VARIABLE),
                    timeout=config.timeout,
                    retries=config.retries,
                    progress=progress,
                )
                for want in wanted
            ]
        case LocalTeacherConfig():
            return _local_teachers(config, student, wanted, world, progress)
    raise AssertionError(f"no teacher for {type(config).__name__}")


def _local_teachers(
    config: LocalTeacherConfig,
    student: "Vocabulary",
    wanted: Sequence[Wanted],
    world: "World",
    progress: Progress,
) -> list[Teacher]:
    from opd.teacher.backend_torch import TorchBackend
    from opd.teacher.local import LocalTeacher

    assert config.model is not None
    backend = TorchBackend(
        config.model,
        dtype=config.dtype,
        device=str(world.device),
        batch_tokens=config.batch_tokens,
        max_length=config.max_length,
    )
    return [
        LocalTeacher(
            backend,
            wanted=want,
            student=student,
            batch_tokens=config.batch_tokens,
            progress=progress,
        )
        for want in wanted
    ]


def teacher_options(config: ServerTeacherConfig) -> "TeacherServerOptions":
    """How to start the server that a run brings along."""
    from opd.teacher.options import BackendName, TeacherServerOptions

    assert config.model is not None
    return TeacherServerOptions(
        model=config.model,
        backend=BackendName(config.backend),
        dtype=config.dtype,
        max_length=config.max_length,
        tensor_parallel_size=config.tensor_parallel,
        gpu_memory_fraction=config.gpu_memory_fraction,
    )


def teacher_info(config: TeacherConfig, student: "Vocabulary") -> TeacherInfo:
    """What the teacher is, before it is loaded.

    Raises ValueError when it cannot be reached or read, or when its vocabulary does not fit.
    """
    from opd.teacher.checkpoint import longest, read_info
    from opd.teacher.client import ServerTeacher
    from opd.teacher.options import TOKEN_VARIABLE
    from opd.teacher.vocabulary import require_fit

    if isinstance(config, ServerTeacherConfig) and config.url is not None:
        token = os.environ.get(TOKEN_VARIABLE)
        try:
            return ServerTeacher(
                config.url, wanted=Wanted(), student=student, token=token, timeout=10, retries=1
            ).info()
        except ConnectionError as error:
            raise ValueError(
                f"teacher.url={config.url} cannot be reached ({error}): start one with "
                "`opd teacher --model MODEL`, or give teacher.model"
            ) from None
    assert config.model is not None
    try:
        info = read_info(config.model, max_length=config.max_length or longest(config.model))
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"teacher.model={config.model} cannot be read as a model folder or hub id ({first})"
        ) from None
    require_fit(info, student)
    return info


def compute_dtype(config: Config) -> "torch.dtype":
    """The number format of the learner's products, and of the engine unless it is told another."""
    import torch

    return torch.float32 if config.train.precision == Precision.fp32 else torch.bfloat16


def engine_dtype(config: Config) -> DType:
    """The number format of the rollout engine's weights."""
    if config.rollout.dtype == DType.auto:
        return DType(str(compute_dtype(config)).removeprefix("torch."))
    return config.rollout.dtype


def build_engine(
    config: Config,
    model: str,
    text: Text,
    max_length: int,
    world: "World",
    progress: Progress,
    mask: "Mask | None" = None,
) -> tuple[RolloutEngine, WeightSync]:
    """The engine that writes, holding ``model``, and the way new weights reach it.

    Of a ``mask`` only the kept values travel.
    """
    rollout, dtype = config.rollout, engine_dtype(config)
    match rollout:
        case ServerRolloutConfig():
            return _server(config, rollout, dtype, mask, text, max_length, world, progress)
        case VllmRolloutConfig():
            return _vllm(config, rollout, dtype, model, text, max_length, world, progress)
        case TransformersRolloutConfig():
            return _transformers(rollout, dtype, config, model, text, world, progress)
    raise AssertionError(f"no rollout engine for {type(rollout).__name__}")


def _vllm(
    config: Config,
    rollout: VllmRolloutConfig,
    dtype: DType,
    model: str,
    text: Text,
    max_length: int,
    world: "World",
    progress: Progress,
) -> tuple[RolloutEngine, WeightSync]:
    from opd.rollout.vllm import VllmRollouts, VllmSettings, start_llm
    from opd.sync.colocated import VllmWeights

    on_gpu = world.device.type == "cuda"
    settings = VllmSettings(
        model=model,
        dtype=dtype.value,
        max_length=max_length,
        seed=config.seed,
        gpu_memory_fraction=rollout.gpu_memory_fraction,
        kv_cache_mib=rollout.kv_cache_mib,
        eager=(not on_gpu) if rollout.eager is None else rollout.eager,
        sleep=rollout.sleep,
        trust_remote_code=config.student.trust_remote_code,
    )
    llm = start_llm(settings, world.device)
    engine = VllmRollouts(
        llm, stop_ids=text.stop_ids, progress=progress, sleeps=rollout.sleep and on_gpu
    )
    return engine, VllmWeights(llm, wake=engine.wake, mark=engine.mark)


def _server(
    config: Config,
    rollout: ServerRolloutConfig,
    dtype: DType,
    mask: "Mask | None",
    text: Text,
    max_length: int,
    world: "World",
    progress: Progress,
) -> tuple[RolloutEngine, WeightSync]:
    import secrets

    from opd.rollout.client import ServerRollouts
    from opd.sync.remote import ServerWeights
    from opd.sync.sparse import WeightSender

    urls = rollout.urls or [u for u in os.environ.get(ROLLOUT_URLS, "").split(",") if u]
    if not urls:
        raise ValueError(
            "rollout=server has no rollout.urls, and another launcher than opd train starts no "
            "servers: start them with `opd rollout` and name them"
        )
    servers = [_service(rollout, url) for url in urls]
    own = servers[world.rank % len(servers)]
    _require_served(own, dtype, text, max_length, retries=rollout.retries)
    drawn = world.sum({"run": float(secrets.randbits(48)) if world.is_main else 0.0})
    run = f"{int(drawn['run']):012x}"
    engine = ServerRollouts(own, run=run, progress=progress)
    sender = WeightSender(
        dtype=torch_dtype(dtype),
        anchor_every=config.sync.anchor_every,
        kept=None if mask is None else mask.indices,
        fingerprint=None if mask is None else mask.fingerprint(),
        run=run,
    )
    return engine, ServerWeights(servers, sender, mark=engine.mark, world=world)


def _service(rollout: ServerRolloutConfig, url: str) -> "ServiceClient":
    from opd.rollout.client import REMEDY, WHAT
    from opd.rollout.options import TOKEN_VARIABLE
    from opd.service.client import ServiceClient

    return ServiceClient(
        url,
        what=WHAT,
        remedy=REMEDY,
        token=os.environ.get(TOKEN_VARIABLE),
        timeout=rollout.timeout,
        retries=rollout.retries,
    )


def require_rollout_servers(config: Config, text: Text, max_length: int) -> None:
    """Ask every server that the run is told to use; ValueError when one is away or does not fit."""
    if isinstance(config.rollout, ServerRolloutConfig):
        for url in config.rollout.urls:
            server = _service(config.rollout, url)
            _require_served(server, engine_dtype(config), text, max_length, retries=1)


def _require_served(
    server: "ServiceClient", dtype: DType, text: Text, max_length: int, *, retries: int
) -> None:
    try:
        told = server.send("GET", "/info", retries=retries).json()
    except ConnectionError as error:
        raise ValueError(str(error)) from None
    wanted = {"dtype": dtype.value, "stop_ids": text.stop_ids}
    for name, value in wanted.items():
        if told[name] != value:
            raise ValueError(
                f"the rollout server at {server.url} has {name} {told[name]}, this run needs "
                f"{value}: start it with the run's student.model and rollout.dtype"
            )
    if told["max_length"] < max_length:
        raise ValueError(
            f"prompt plus completion can reach {max_length} tokens, the rollout server at "
            f"{server.url} takes {told['max_length']}: start it with a larger --max-length"
        )


def rollout_options(config: Config, max_length: int) -> "RolloutServerOptions":
    """How to start a server that a run brings along."""
    from opd.rollout.options import RolloutServerOptions

    rollout = config.rollout
    assert isinstance(rollout, ServerRolloutConfig)
    return RolloutServerOptions(
        model=config.student.model,
        dtype=engine_dtype(config),
        max_length=max_length,
        seed=config.seed,
        gpu_memory_fraction=rollout.gpu_memory_fraction,
        kv_cache_mib=rollout.kv_cache_mib,
        eager=rollout.eager,
        trust_remote_code=config.student.trust_remote_code,
    )


def in_process(rollout: RolloutConfig) -> RolloutConfig:
    """The same engine in this process, for work to which nobody sends weights."""
    if isinstance(rollout, ServerRolloutConfig):
        names = [f.name for f in fields(VllmRolloutConfig)]
        return VllmRolloutConfig(**{name: getattr(rollout, name) for name in names})
    return rollout


def build_host(options: "RolloutServerOptions") -> "Hosted":
    """The engine of a rollout server and the doors through which weights reach it."""
    from opd.rollout.app import Hosted, ServedModel
    from opd.rollout.options import EngineName
    from opd.sync.sparse import WeightReceiver
    from opd.tracking.console import SilentProgress

    text = build_text(options.model, trust_remote_code=options.trust_remote_code)
    max_length = options.max_length or text.max_length
    match options.engine:
        case EngineName.vllm:
            engine, load = _hosted_vllm(options, text, max_length, SilentProgress())
        case EngineName.transformers:
            engine, load = _hosted_transformers(options, text, SilentProgress())
    receiver = WeightReceiver(load)
    told = ServedModel(
        model=options.model,
        dtype=options.dtype.value,
        max_length=max_length,
        stop_ids=text.stop_ids,
    )
    return Hosted(engine=engine, model=told, take=receiver.take, held=receiver.held)


def _hosted_vllm(
    options: "RolloutServerOptions", text: Text, max_length: int, progress: Progress
) -> tuple[RolloutEngine, "Load"]:
    import torch

    from opd.rollout.vllm import VllmRollouts, VllmSettings, start_llm
    from opd.sync.colocated import VllmWeights
    from opd.sync.patched import loaded_whole, patched_in_place

    on_gpu = torch.cuda.is_available()
    settings = VllmSettings(
        model=options.model,
        dtype=options.dtype.value,
        max_length=max_length,
        seed=options.seed,
        gpu_memory_fraction=options.gpu_memory_fraction,
        kv_cache_mib=options.kv_cache_mib,
        eager=(not on_gpu) if options.eager is None else options.eager,
        sleep=False,
        trust_remote_code=options.trust_remote_code,
    )
    llm = start_llm(settings, torch.device("cuda" if on_gpu else "cpu"))
    engine = VllmRollouts(llm, stop_ids=text.stop_ids, progress=progress, sleeps=False)
    whole = VllmWeights(llm, wake=engine.wake, mark=engine.mark)
    if on_gpu:
        return engine, patched_in_place(llm, whole, mark=engine.mark)
    return engine, loaded_whole(whole)


def _hosted_transformers(
    options: "RolloutServerOptions", text: Text, progress: Progress
) -> tuple[RolloutEngine, "Load"]:
    import torch

    from opd.rollout.transformers import TransformersRollouts
    from opd.sync.colocated import ModuleWeights
    from opd.sync.patched import loaded_whole
    from opd.train.weights import load_student

    module = load_student(
        options.model,
        dtype=torch_dtype(options.dtype),
        attention="sdpa",
        trust_remote_code=options.trust_remote_code,
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    engine = TransformersRollouts(
        module,
        stop_ids=text.stop_ids,
        pad_id=text.pad_id,
        batch_size=options.batch_size,
        progress=progress,
    )
    return engine, loaded_whole(ModuleWeights(module, mark=engine.mark))


def _transformers(
    rollout: RolloutConfig,
    dtype: DType,
    config: Config,
    model: str,
    text: Text,
    world: "World",
    progress: Progress,
) -> tuple[RolloutEngine, WeightSync]:
    assert isinstance(rollout, TransformersRolloutConfig)
    from opd.rollout.transformers import TransformersRollouts
    from opd.sync.colocated import ModuleWeights
    from opd.train.weights import load_student

    module = load_student(
        model,
        dtype=torch_dtype(dtype),
        attention=config.student.attention,
        trust_remote_code=config.student.trust_remote_code,
    ).to(world.device)
    engine = TransformersRollouts(
        module,
        stop_ids=text.stop_ids,
        pad_id=text.pad_id,
        batch_size=rollout.batch_size,
        progress=progress,
    )
    return engine, ModuleWeights(module, mark=engine.mark)


def torch_dtype(dtype: DType) -> "torch.dtype":
    """DType.bfloat16 -> torch.bfloat16"""
    import torch

    return {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16}[dtype]


RUN_MASK = "mask.safetensors"
"""Where a run keeps the mask that it trains."""


def read_run_mask(config: Config, folder: Path) -> "Mask | None":
    """The mask of a run, which was put into its folder before it started; None trains everything."""
    if active_mask(config) is None:
        return None
    from opd.mask.mask import read_mask

    return read_mask(folder / RUN_MASK)


def build_learner(
    config: Config,
    mask: "Mask | None",
    teacher: Teacher,
    text: Text,
    world: "World",
    progress: Progress,
    write: "Write",
) -> tuple["StudentLearner", "torch.nn.Module"]:
    """The student under its training engine, and the transformers (or peft) model inside it.

    ``write`` takes what record=weights finds.
    """
    import torch

    from opd.head import head_spec
    from opd.train.learner import StudentLearner
    from opd.train.optimizers import build_optimizer
    from opd.train.student import Student, causal_lm
    from opd.train.watch import SquaredGradients
    from opd.train.weights import load_student, with_lora

    pure = config.train.precision == Precision.pure_bf16
    model = load_student(
        config.student.model,
        dtype=torch.bfloat16 if pure else torch.float32,
        attention=config.student.attention,
        trust_remote_code=config.student.trust_remote_code,
    ).to(world.device)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
    if isinstance(config.adapter, LoraConfig):
        model = with_lora(model, config.adapter)
    confinement = _confinement(config.mask, mask, model)

    @cache
    def teacher_head() -> torch.Tensor:
        return torch.from_numpy(teacher.head()).to(world.device)

    student = Student(
        model,
        spec=head_spec(causal_lm(model).config, min(text.vocab_size, teacher.info().vocab_size)),
        temperature=config.rollout.temperature,
        chunk_bytes=config.train.chunk_mib << 20,
        teacher_head=teacher_head,
    ).to(world.device)
    optimizer = (
        SquaredGradients(student.parameters())
        if config.train.scores in (Watched.fisher, Watched.first_gradient)
        else build_optimizer(student, config.optim)
    )
    discount = config.loss.discount if isinstance(config.loss, PolicyGradientLossConfig) else 0.0
    engine = _training_engine(config, student, optimizer, confinement, world)
    learner = StudentLearner(
        engine,
        model,
        build_loss(config.loss),
        confinement=confinement,
        optim=config.optim,
        steps=config.train.steps,
        micro_tokens=config.train.micro_tokens,
        pad_id=text.pad_id,
        discount=discount,
        world=world,
        progress=progress,
        recorder=_recorder(config, causal_lm(model), engine, world, write),
    )
    return learner, model


def _recorder(
    config: Config,
    causal: "torch.nn.Module",
    engine: "Engine",
    world: "World",
    write: "Write",
) -> "Recorder":
    from opd.tensors import open_checkpoint
    from opd.train.record import Unrecorded, WeightRecorder

    if not isinstance(config.record, WeightRecordConfig):
        return Unrecorded()
    still = config.train.scores in (Watched.fisher, Watched.first_gradient)
    adam = config.optim if isinstance(config.optim, AdamWConfig) and not still else None
    return WeightRecorder(
        causal,
        engine,
        open_checkpoint(config.student.model),
        every=config.record.every,
        steps=config.train.steps,
        adam=adam,
        world=world,
        write=write,
    )


def _confinement(
    config: MaskConfig, mask: "Mask | None", model: "torch.nn.Module"
) -> "Confinement":
    from opd.train.confine import CompactWeights, RestoredWeights, Unconfined

    if mask is None:
        return Unconfined(model)
    assert isinstance(config, FileMaskConfig | DiscoverMaskConfig)
    match config.training:
        case MaskTraining.compact:
            return CompactWeights(model, mask)
        case MaskTraining.restore:
            return RestoredWeights(model, mask)


def _training_engine(
    config: Config,
    student: "Student",
    optimizer: "torch.optim.Optimizer",
    confinement: "Confinement",
    world: "World",
) -> "Engine":
    from opd.train.engine import DeepSpeedEngine, TorchEngine, merged_deepspeed

    if config.launch.engine == TrainingEngine.torch:
        return TorchEngine(
            student,
            optimizer,
            gradients=confinement.gradients,
            precision=config.train.precision,
            clip=config.optim.clip,
            device=world.device,
        )
    merged = merged_deepspeed(
        config.launch.deepspeed,
        zero=config.zero,
        precision=config.train.precision,
        clip=config.optim.clip,
    )
    return DeepSpeedEngine(student, optimizer, config=merged, world=world)


def build_evaluator(
    config: Config,
    prompts: Prompts,
    text: Text,
    engine: RolloutEngine,
    world: "World",
    *,
    teacher: Teacher | None = None,
    measure: Callable[[Sequence[Rollout]], dict[str, float]] | None = None,
    teacher_accuracy: float | None = None,
) -> Evaluator | None:
    """The examination of ``config.eval``; None when there is nothing to ask."""
    from opd.evaluate.divergence import DivergenceEvaluator
    from opd.evaluate.evaluator import Evaluators, TaskEvaluator
    from opd.evaluate.grade import grader

    tasks: list[Evaluator] = []
    if prompts.eval:
        tasks.append(
            TaskEvaluator(
                task=config.eval.task,
                prompts=prompts.eval,
                engine=engine,
                decode=text.decode,
                grade=grader(config.eval.grader.value, config.eval.marker),
                world=world,
                max_tokens=config.eval.max_tokens or config.rollout.max_tokens,
                seed=config.seed,
                k=config.eval.k,
                temperature=config.eval.temperature,
                samples=config.eval.samples,
                teacher=teacher,
                teacher_accuracy=teacher_accuracy,
            )
        )
    if prompts.divergence and measure is not None:
        tasks.append(
            DivergenceEvaluator(
                task=config.eval.task,
                prompts=prompts.divergence,
                engine=engine,
                measure=measure,
                world=world,
                max_tokens=config.rollout.max_tokens,
                temperature=config.rollout.temperature,
                seed=config.seed,
            )
        )
    return Evaluators(tasks=tasks) if tasks else None


def build_stream(config: Config, prompts: Prompts, *, rank: int, size: int) -> PromptStream:
    """The training prompts in their seeded order; ValueError when a step needs more than there are."""
    from opd.data.stream import ShuffledPrompts

    return ShuffledPrompts(prompts.train, config.train.prompts_per_step, config.seed, rank, size)


VERIFY_PROMPTS = 4
# Mean nats. Measured on SmolLM2-135M, 30 layers, bf16 on both sides: 0.034, with weight noise 0.048;
# each side is 0.022-0.039 from float32. A tied head that was not packed anew makes about 1.
DEFAULT_GAP = {Precision.fp32: 1e-3, Precision.bf16: 0.15, Precision.pure_bf16: 0.15}


def build_sync_check(
    config: Config, prompts: Prompts, engine: RolloutEngine, learner: Reader, world: "World"
) -> "SyncCheck":
    """Compares engine and learner on a few training prompts of each rank."""
    from opd.sync.verify import SyncCheck

    return SyncCheck(
        engine,
        learner,
        prompts.train[world.rank :: world.size][:VERIFY_PROMPTS],
        sampling_of(config),
        bound=config.sync.max_gap or DEFAULT_GAP[config.train.precision],
        world=world,
    )


def build_weight_file(
    config: Config, folder: Path, world: "World", found: tuple[Path, int] | None
) -> "Write":
    """Where record=weights writes; ``found`` is the checkpoint that the run goes on from."""
    from opd.tracking.jsonl import WeightRecord

    if not world.is_main or not isinstance(config.record, WeightRecordConfig):
        return lambda step, row: None
    return WeightRecord(folder, None if found is None else found[1]).append


def build_console(world: "World", terminal: TextIO) -> tuple[Any, Progress]:
    """A rich console and its bars on rank 0; silence elsewhere."""
    from rich.console import Console

    from opd.tracking.console import ConsoleProgress, SilentProgress

    console = Console(file=terminal, quiet=not world.is_main)
    return console, ConsoleProgress(console) if world.is_main else SilentProgress()


def build_trackers(
    config: Config,
    folder: Path,
    resolved: dict[str, Any],
    console: Any,
    world: "World",
    found: tuple[Path, int] | None,
) -> Tracker:
    """Files always, the console always, Weights & Biases when asked; nothing but on rank 0.

    ``found`` is the checkpoint that the run goes on from.
    """
    from opd.tracking.console import ConsoleTracker
    from opd.tracking.fanout import Trackers
    from opd.tracking.jsonl import JsonlTracker
    from opd.tracking.wandb import WandbTracker

    if not world.is_main:
        return Trackers()
    trackers: list[Tracker] = [
        JsonlTracker(folder, None if found is None else found[1]),
        ConsoleTracker(console, config.train.steps),
    ]
    if isinstance(config.tracking, WandbConfig):
        trackers.append(
            WandbTracker(
                project=config.tracking.project,
                name=config.run.name,
                folder=folder,
                config=resolved,
                mode=config.tracking.mode.value,
            )
        )
    return Trackers(trackers)
