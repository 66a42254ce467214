"""The order of a service's requests, and what is read of them ahead."""

import asyncio

from opd.serving.admission import AdmissionQueue, QueuedRequest


def admitted(*places: QueuedRequest) -> list[bool]:
    return [place.is_admitted for place in places]


def test_bodies_are_read_in_order_while_there_is_room() -> None:
    line = AdmissionQueue(max_bytes=100)
    first, second, third, fourth = (line.join(size) for size in (60, 30, 40, 5))
    assert admitted(first, second, third, fourth) == [True, True, False, False]
    line.leave(second)
    assert admitted(third, fourth) == [True, False]
    line.leave(first)
    assert admitted(fourth) == [True]


def test_one_that_is_alone_is_read_whatever_its_size() -> None:
    line = AdmissionQueue(max_bytes=100)
    large, small = line.join(500), line.join(1)
    assert admitted(large, small) == [True, False]
    line.leave(large)
    assert admitted(small) == [True]
    line.leave(small)
    assert admitted(line.join(101)) == [True]


def test_a_large_one_is_not_passed_by_small_ones() -> None:
    line = AdmissionQueue(max_bytes=100)
    first, large = line.join(60), line.join(90)
    small = [line.join(1) for _ in range(20)]
    assert not any(admitted(large, *small))
    line.leave(first)
    assert all(admitted(large, *small[:10]))
    assert not any(admitted(*small[10:]))


def test_what_is_ahead_of_a_request_only_falls() -> None:
    line = AdmissionQueue(max_bytes=1000, fresh_s=0)
    places = [line.join(400) for _ in range(4)]
    ahead = [line.ahead(place) for place in places]
    assert ahead == [0, 100, 200, 300]
    places[0].tokens = 70
    line.join(4000)
    assert [line.ahead(place) for place in places] == [0, 70, 170, 270]
    line.leave(places[1])
    line.leave(places[1])
    assert line.ahead(places[3]) == 170
    line.leave(places[0])
    assert [line.ahead(place) for place in places[2:]] == [0, 100]


def test_a_waiting_request_is_told_when_it_is_admitted() -> None:
    async def wait() -> None:
        line = AdmissionQueue(max_bytes=10)
        first, second = line.join(10), line.join(10)
        await line.wait_until_admitted(first)
        waiting = asyncio.create_task(line.wait_until_admitted(second))
        await asyncio.sleep(0)
        assert not waiting.done()
        line.leave(first)
        await asyncio.wait_for(waiting, 10)

    asyncio.run(wait())
