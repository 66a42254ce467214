"""Who sits on which card, with which share of it, and which settings are refused before a start."""

from collections.abc import Sequence

import pytest

from opd.config.schema import Config
from opd.run.commands import teacher_server_config
from opd.run.place import choose_processes, place
from opd.run.placement import Cards, Placement
from opd.run.plan_table import describe_placement
from opd.run.recipe import composed, find_recipe
from opd.run.shares import MARGIN
from opd.teacher.model_info import LayerShape

QWEN_7B = LayerShape(heads=28, key_value_heads=4, intermediate_size=18944)
POOL = ["teacher=pool", "teacher.model=null", "+teacher.members.a=A", "+teacher.members.b=B"]


def config(count: int, *overrides: str) -> Config:
    """The quickstart with a number of processes for ``count`` cards."""
    recipe = composed(find_recipe("quickstart"), overrides)
    if recipe.config.launch.processes == "auto":
        recipe.config.launch.processes = choose_processes(recipe.config, Cards(count=count))
    return recipe.config


def placed(count: int, *overrides: str, shape: LayerShape | None = QWEN_7B) -> Placement:
    return place(config(count, *overrides), Cards(count=count), read_shape=lambda model: shape)


def totals(placement: Placement) -> list[float]:
    """The share of each card that its engines take together."""
    return [
        sum(s.gpu_memory_utilization for s in servers) + len(ranks) * placement.engine_utilization
        for ranks, servers in map(placement.on, range(placement.cards.count))
    ]


def seats(placement: Placement) -> tuple[Sequence[int | None], list[tuple[int, ...]]]:
    return placement.ranks, [server.cards for server in placement.teachers]


@pytest.mark.parametrize(
    ("count", "overrides", "ranks", "teachers"),
    [
        (0, [], (None, None), [()]),
        (1, [], (0,), [(0,)]),
        (2, [], (0, 1), [(0,)]),
        (8, [], tuple(range(8)), [(0,)]),
        (8, ["launch.processes=4"], (0, 1, 2, 3), [(4, 5, 6, 7)]),
        (8, ["launch.processes=5"], (0, 1, 2, 3, 4), [(5, 6)]),  # 28 heads divide over 2, not 3
        (8, ["launch.processes=7"], tuple(range(7)), [(7,)]),
        (8, ["teacher.devices='7'"], tuple(range(7)), [(7,)]),
        (8, ["teacher.devices='1,0'"], tuple(range(2, 8)), [(1, 0)]),
        (2, ["teacher.devices='0'"], (1,), [(0,)]),
        (8, ["launch.processes=8", "teacher.devices='6,7'"], tuple(range(8)), [(6, 7)]),
        (8, ["teacher.tensor_parallel_size=4"], tuple(range(8)), [(0, 1, 2, 3)]),
        (8, ["launch.processes=4", "teacher.tensor_parallel_size=1"], (0, 1, 2, 3), [(4,)]),
        (8, ["launch.processes=4", "teacher.backend=torch"], (0, 1, 2, 3), [(4,)]),
        (4, POOL, (0, 1, 2, 3), [(0,), (1,)]),
        (1, POOL, (0,), [(0,), (0,)]),
        (8, [*POOL, "launch.processes=4"], (0, 1, 2, 3), [(4, 5), (6, 7)]),
        (8, [*POOL, "launch.processes=7"], tuple(range(7)), [(7,), (7,)]),
        (8, [*POOL, "teacher.replicas=3"], tuple(range(8)), [(n,) for n in range(6)]),
        (8, [*POOL, "teacher.devices='4,5,6,7'"], (0, 1, 2, 3), [(4, 5), (6, 7)]),
        (3, [*POOL, "teacher.devices='1,2'", "teacher.tensor_parallel_size=2"], (0,), [(1, 2)] * 2),
        (8, ["teacher.url=http://h:1", "teacher.devices='7'"], tuple(range(8)), []),
        (2, ["launch.engine=torch"], (0,), [(1,)]),
        (2, ["teacher=local"], (0, 1), []),
    ],
    ids=str,
)
def test_ranks_and_teachers_sit_where_the_settings_and_the_cards_say(
    count: int,
    overrides: list[str],
    ranks: tuple[int | None, ...],
    teachers: list[tuple[int, ...]],
) -> None:
    placement = placed(count, *overrides)
    assert seats(placement) == (ranks, teachers)
    assert all(total <= 1 - MARGIN + 1e-6 for total in totals(placement))


@pytest.mark.parametrize(
    ("count", "overrides", "cards"),
    [
        (0, [], [()]),
        (1, [], [(0,)]),
        (2, [], [(1,)]),  # the teacher is on card 0
        (4, ["rollout.servers=3"], [(1,), (2,), (3,)]),
        (8, ["launch.processes=4", "rollout.servers=2"], [(6,), (7,)]),  # the teacher has 4 and 5
        (8, ["rollout.devices='7,6'", "rollout.servers=2"], [(7,), (6,)]),
        (4, ["launch.processes=3", "rollout.servers=2"], [(0,), (1,)]),
    ],
    ids=str,
)
def test_every_rollout_server_has_a_card_of_its_own(
    count: int, overrides: list[str], cards: list[tuple[int, ...]]
) -> None:
    placement = placed(count, "rollout=server", *overrides)
    assert [server.cards for server in placement.rollout_servers] == cards
    assert placement.engine_utilization == 0
    assert all(total <= 1 - MARGIN + 1e-6 for total in totals(placement))


@pytest.mark.parametrize(
    ("count", "overrides", "engine", "teachers"),
    [
        (0, [], 0.35, [0.45]),
        (1, [], 0.35, [0.45]),
        (1, POOL, 0.35, [0.225, 0.225]),
        (2, ["teacher.devices='1'"], 0.35, [0.8]),
        (3, [*POOL, "launch.processes=2"], 0.35, [0.4, 0.4]),
        (1, ["teacher.gpu_memory_utilization=0.6"], 0.3, [0.6]),
        (1, ["rollout.gpu_memory_utilization=0.6"], 0.6, [0.3]),
        (
            1,
            ["rollout.gpu_memory_utilization=0.5", "teacher.gpu_memory_utilization=0.5"],
            0.5,
            [0.5],
        ),
        (1, ["rollout=transformers"], 0.0, [0.45]),
        (0, ["rollout.gpu_memory_utilization=0.6"], 0.6, [0.45]),
    ],
    ids=str,
)
def test_shares_are_those_of_the_settings_and_else_fit_beside_them(
    count: int, overrides: list[str], engine: float, teachers: list[float]
) -> None:
    placement = placed(count, *overrides)
    assert placement.engine_utilization == engine
    assert [server.gpu_memory_utilization for server in placement.teachers] == teachers


@pytest.mark.parametrize(
    ("count", "overrides", "sentence"),
    [
        (
            2,
            ["launch.processes=3"],
            "launch.processes=3 needs as many GPUs and 2 can be seen: set launch.processes=2, or make more "
            "visible (CUDA_VISIBLE_DEVICES)",
        ),
        (
            2,
            ["teacher.devices='7'"],
            "teacher.devices=7 names 7, and the visible GPUs are 0, 1: name some of these, or make more "
            "visible (CUDA_VISIBLE_DEVICES)",
        ),
        (2, ["teacher.devices='0,0'"], "teacher.devices=0,0 names GPU 0 twice: name each once"),
        (
            4,
            ["rollout=server", "rollout.devices='1,1'"],
            "rollout.devices=1,1 names GPU 1 twice: name each once",
        ),
        (
            4,
            ["rollout=server", "rollout.devices='1,'"],
            "rollout.devices=1, names nothing, and the visible GPUs are 0, 1, 2, 3: name some of these, or "
            "make more visible (CUDA_VISIBLE_DEVICES)",
        ),
        (
            8,
            ["teacher.tensor_parallel_size=8"],
            "teacher.tensor_parallel_size=8 does not divide the 28 attention heads (4 of keys and values) "
            "and the MLP of TEACHER: allowed are 1, 2, 4",
        ),
        (
            2,
            ["teacher.tensor_parallel_size=4"],
            "teacher.tensor_parallel_size=4 needs as many GPUs for the teacher and 2 can be seen: lower it, "
            "or give the teacher more (teacher.devices, fewer launch.processes)",
        ),
        (
            4,
            ["teacher.tensor_parallel_size=4", "launch.processes=2"],
            "teacher.tensor_parallel_size=4 needs as many GPUs for the teacher and 2 are free of ranks: "
            "lower it, or give the teacher more (teacher.devices, fewer launch.processes)",
        ),
        (
            4,
            ["teacher.tensor_parallel_size=4", "teacher.devices='2,3'"],
            "teacher.tensor_parallel_size=4 needs as many GPUs for the teacher and teacher.devices=2,3 names "
            "2: lower it, or give the teacher more (teacher.devices, fewer launch.processes)",
        ),
        (
            2,
            ["rollout=server", "rollout.servers=3"],
            "rollout.servers=3 would put two engines on one GPU, there are 2 for them: set "
            "rollout.servers=2, or name more GPUs (rollout.devices, CUDA_VISIBLE_DEVICES)",
        ),
        (
            4,
            ["rollout=server", "rollout.servers=2", "rollout.devices='3'"],
            "rollout.servers=2 would put two engines on one GPU, there are 1 for them: set "
            "rollout.servers=1, or name more GPUs (rollout.devices, CUDA_VISIBLE_DEVICES)",
        ),
        (
            1,
            ["rollout.gpu_memory_utilization=0.6", "teacher.gpu_memory_utilization=0.6"],
            "GPU 0 is to give 1.2 of its memory to 2 engines (teacher.gpu_memory_utilization=0.6, "
            "rollout.gpu_memory_utilization=0.6), and has 1: lower rollout.gpu_memory_utilization and "
            "teacher.gpu_memory_utilization, or give servers GPUs of their own (teacher.devices, "
            "rollout.devices, fewer launch.processes)",
        ),
        (
            2,
            ["teacher.gpu_memory_utilization=0.9"],
            "2 engines share GPU 0 and teacher.gpu_memory_utilization=0.9 leaves too little to the others: "
            "lower "
            "teacher.gpu_memory_utilization, or give servers GPUs of their own (teacher.devices, "
            "rollout.devices, fewer launch.processes)",
        ),
        (
            1,
            [*POOL, "teacher.replicas=10"],
            "21 engines share GPU 0 and 0.022 of its memory is left to each, at least 0.05 is needed: start "
            "fewer (teacher.replicas, rollout.servers), or give servers GPUs of their own (teacher.devices, "
            "rollout.devices, fewer launch.processes)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_sit_anywhere_is_refused_with_what_would_help(
    count: int, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(ValueError) as error:
        placed(
            count, *([] if "teacher=pool" in overrides else ["teacher.model=TEACHER"]), *overrides
        )
    assert str(error.value) == sentence


def test_a_teacher_alone_on_its_card_may_have_nearly_all_of_it() -> None:
    placement = placed(2, "teacher.devices='1'", "teacher.gpu_memory_utilization=0.97")
    assert totals(placement) == pytest.approx([0.35, 0.97])


def test_cards_have_the_names_of_the_variable() -> None:
    cards = Cards(count=3, ids=("GPU-a", "GPU-b", "GPU-c"))
    recipe = composed(find_recipe("quickstart"), ["teacher.devices='GPU-b'", "launch.processes=2"])
    placement = place(recipe.config, cards, read_shape=lambda model: QWEN_7B)
    assert seats(placement) == ((0, 2), [(1,)])
    assert cards.visible(placement.rank_cards) == {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-c"}
    assert "process(es) on GPU GPU-a, GPU-c" in describe_placement(placement)


def test_a_pool_s_models_are_split_by_their_own_heads() -> None:
    shapes = {"A": QWEN_7B, "B": LayerShape(heads=9, key_value_heads=3, intermediate_size=1536)}
    found = place(
        config(8, *POOL, "launch.processes=2"), Cards(count=8), read_shape=shapes.__getitem__
    )
    assert seats(found) == ((0, 1), [(2, 3), (4, 5, 6)])


def test_a_model_that_cannot_be_read_is_not_split() -> None:
    assert seats(placed(8, "launch.processes=4", shape=None))[1] == [(4,)]


class Forecast:
    """Fits where each teacher is split over at least ``split`` cards; counts what it was shown."""

    def __init__(self, split: int) -> None:
        self.split = split
        self.shown: list[int] = []

    def __call__(self, placement: Placement) -> list[str]:
        widths = [len(server.cards) for server in placement.teachers]
        self.shown += widths
        return [] if min(widths) >= self.split else ["GPU 0 needs 81.0 GiB of 79.0 while it scores"]


def test_a_teacher_beside_ranks_is_split_until_it_fits() -> None:
    forecast = Forecast(4)
    found = place(config(8), Cards(count=8), forecast, read_shape=lambda model: QWEN_7B)
    assert seats(found) == (tuple(range(8)), [(0, 1, 2, 3)])
    assert forecast.shown == [1, 1, 1, 1, 2, 2, 2, 2, 4]


def test_shares_are_lowered_before_a_model_is_split() -> None:
    def fits(placement: Placement) -> list[str]:
        return [] if placement.teachers[0].gpu_memory_utilization < 0.3 else ["too full"]

    found = place(config(8), Cards(count=8), fits, read_shape=lambda model: QWEN_7B)
    assert seats(found) == (tuple(range(8)), [(0,)])
    assert found.teachers[0].gpu_memory_utilization == pytest.approx(0.45 * 0.6, abs=1e-3)
    assert found.engine_utilization == pytest.approx(0.35 * 0.6, abs=1e-3)
    given = config(8, "teacher.gpu_memory_utilization=0.45")
    with pytest.raises(ValueError, match=r"^too full: .*lower teacher\.gpu_memory_utilization"):
        place(given, Cards(count=8), fits, read_shape=lambda model: QWEN_7B)


def test_a_run_that_fits_nowhere_is_refused_with_card_phase_and_settings() -> None:
    with pytest.raises(
        ValueError,
        match=r"^GPU 0 needs 81.0 GiB of 79.0 while it scores: leave GPUs to the teacher "
        r"\(launch.processes=1 or fewer\), teacher.sleep=true, zero=3, .* or adapter=lora; "
        r"launch.memory_check=false tries it all the same$",
    ):
        place(config(2), Cards(count=2), Forecast(8), read_shape=lambda model: QWEN_7B)


def test_a_setting_that_does_not_fit_is_named() -> None:
    settings = ["teacher.tensor_parallel_size=1", "teacher.gpu_memory_utilization=0.5"]
    with pytest.raises(
        ValueError, match=r"raise teacher.tensor_parallel_size, lower teacher.gpu_mem"
    ):
        place(config(2, *settings), Cards(count=2), Forecast(2), read_shape=lambda model: QWEN_7B)


def test_a_server_on_the_cpu_is_split_as_its_setting_says() -> None:
    settings = config(0, "teacher.tensor_parallel_size=2")
    placement = place(settings, Cards(count=0))
    assert teacher_server_config(settings, placement.teachers[0]).tensor_parallel_size == 2


@pytest.mark.parametrize(
    ("count", "lines"),
    [
        (0, ["2 process(es) on the CPU, 1 teacher server(s)"]),
        (
            2,
            [
                "2 GPU(s) H100, 80 GiB",
                "process(es) on GPU 0, 1, each with an engine (0.35 of it)",
                "teacher TEACHER on GPU 0 (0.45 of it)",
            ],
        ),
    ],
)
def test_the_plan_says_who_sits_where(count: int, lines: list[str]) -> None:
    settings = config(count, "teacher.model=TEACHER")
    cards = Cards(count=count, memory_bytes=80 << 30, name="H100")
    placement = place(settings, cards, read_shape=lambda model: QWEN_7B)
    assert describe_placement(placement).splitlines() == lines
