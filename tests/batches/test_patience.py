"""Waiting for an engine that is busy or away, and no longer than that helps."""

import asyncio
from collections import Counter
from itertools import islice

import pytest

from server.batches.patience import MAX_LOSSES, MAX_PAUSE_SECONDS, PatientEngine, Pauses
from server.domain.errors import InvalidInput, ResourceExhausted, ServiceError, Unavailable
from server.inference.engine import EmbeddedEngine
from tests.batches.conftest import BASE, TroubledEngine
from tests.inference.asking import ask

BUSY = ResourceExhausted("Full.", reason="QUEUE_FULL", retry_after_seconds=0.01)
LOST = Unavailable("Lost.", reason="ENGINE_UNAVAILABLE", retry_after_seconds=0.01)


def make_patient(troubled: TroubledEngine) -> PatientEngine:
    return PatientEngine(troubled.port, pause_seconds=0.001)


async def test_a_full_queue_is_waited_for_however_long(engine: EmbeddedEngine) -> None:
    troubled = TroubledEngine(engine)
    troubled.trouble = lambda _: BUSY if len(troubled.calls) < 12 else None
    answered = await make_patient(troubled).answer(ask("Hello", max_tokens=2))
    assert answered.finished.usage.completion_tokens == 2
    assert troubled.calls == ["r"] * 12


async def test_a_lost_engine_is_waited_for_until_it_lives(engine: EmbeddedEngine) -> None:
    troubled = TroubledEngine(engine)
    troubled.trouble = lambda _: LOST if len(troubled.calls) < 9 else None
    answered = await make_patient(troubled).answer(ask("Hello", max_tokens=2))
    assert answered.choices[0].text
    assert troubled.calls == ["r", *["describe"] * 8, "r"]


async def test_a_model_that_kills_the_engine_is_given_up(engine: EmbeddedEngine) -> None:
    troubled = TroubledEngine(engine, lambda what: LOST if what == "load" else None)
    with pytest.raises(Unavailable):
        await make_patient(troubled).load(BASE)
    assert Counter(troubled.calls) == {"load": MAX_LOSSES, "describe": MAX_LOSSES - 1}


async def test_a_request_that_kills_the_engine_fails_alone(engine: EmbeddedEngine) -> None:
    """It takes those down that run beside it; they are asked again one at a time, and none of them is blamed."""
    troubled = TroubledEngine(engine)
    lost_together = asyncio.Barrier(4)

    async def answer(name: str) -> str:
        try:
            return (await patient.answer(ask("Hello", name=name, max_tokens=2))).choices[0].text
        except Unavailable as error:
            return error.reason

    def trouble(what: str) -> ServiceError | None:
        first = troubled.calls.count(what) == 1 and what != "describe"
        return LOST if what == "poison" or first else None

    troubled.trouble = trouble
    patient = make_patient(troubled)

    async def begin(name: str) -> str:
        await lost_together.wait()
        return await answer(name)

    said = await asyncio.gather(*(begin(name) for name in ("a", "poison", "b", "c")))
    assert said[1] == "ENGINE_UNAVAILABLE"
    assert "ENGINE_UNAVAILABLE" not in (said[0], said[2], said[3])
    counted = Counter(troubled.calls)
    assert (counted["a"], counted["b"], counted["c"], counted["poison"]) == (2, 2, 2, MAX_LOSSES)


@pytest.mark.parametrize(
    "error",
    [InvalidInput("Too long.", reason="PROMPT_TOO_LONG"), ResourceExhausted("Never.", reason="REQUEST_TOO_LARGE")],
    ids=lambda error: error.reason,
)
async def test_what_waiting_does_not_change_is_told_at_once(engine: EmbeddedEngine, error: ServiceError) -> None:
    troubled = TroubledEngine(engine, lambda _: error)
    with pytest.raises(type(error)):
        await make_patient(troubled).answer(ask("Hello"))
    assert troubled.calls == ["r"]


def test_pauses_grow_to_a_limit_and_are_spread() -> None:
    pauses = list(islice(Pauses(0.5), 40))
    assert 0.25 <= pauses[0] <= 0.5
    assert all(MAX_PAUSE_SECONDS / 2 <= pause <= MAX_PAUSE_SECONDS for pause in pauses[10:])
    assert len(set(pauses[10:])) > 20
