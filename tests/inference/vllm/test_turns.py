"""A base model and its versions take turns: never both at once, nobody for ever last, and who leaves holds up nobody."""

import asyncio
import random

from server.inference.vllm.turns import Turns


async def test_the_two_sides_never_run_together_and_each_side_does() -> None:
    turns, running, most = Turns(), [0, 0], [0, 0]
    order = random.Random(1)  # noqa: S311  # no secret

    async def run(side: int, is_cancelled: bool) -> None:
        async with turns.take(is_version=bool(side)):
            running[side] += 1
            assert running[1 - side] == 0
            most[side] = max(most[side], running[side])
            try:
                await asyncio.sleep(60 if is_cancelled else 0.001 * order.random())
            finally:
                running[side] -= 1

    tasks, cancelled = list[asyncio.Task[None]](), list[asyncio.Task[None]]()
    for place in range(300):
        is_cancelled = place % 5 == 0
        task = asyncio.create_task(run(order.randrange(2), is_cancelled))
        (cancelled if is_cancelled else tasks).append(task)
    await asyncio.sleep(0.01)
    for task in cancelled:  # some run, some wait
        task.cancel()
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks)
    assert min(most) > 1


async def test_nobody_overtakes_one_who_waits_for_the_other_side() -> None:
    turns, seen = Turns(), list[str]()

    async def run(name: str, is_version: bool) -> None:
        async with turns.take(is_version=is_version):
            seen.append(name)
            await asyncio.sleep(0.001)

    await asyncio.gather(run("base", False), run("version", True), run("later base", False))
    assert seen == ["base", "version", "later base"]
