"""An executor whose thread passes."""

import threading
import time
from collections.abc import Iterator

import pytest

from server.inference.passingthread import PassingThread

NAME = "passing-test"


@pytest.fixture
def executor() -> Iterator[PassingThread]:
    executor = PassingThread(NAME, idle_seconds=0.02)
    yield executor
    executor.shutdown(cancel_futures=True)


def find_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def wait_for_end() -> None:
    end = time.monotonic() + 10
    while find_threads():
        assert time.monotonic() < end, "the idle thread did not end"
        time.sleep(0.005)


def test_work_is_done_in_order_by_one_thread_at_a_time(executor: PassingThread) -> None:
    done: list[int] = []

    def work(number: int) -> int:
        assert len(find_threads()) == 1
        done.append(number)
        return number

    assert [future.result() for future in [executor.submit(work, number) for number in range(50)]] == list(range(50))
    assert done == list(range(50))


def test_an_idle_thread_ends_and_the_next_work_starts_another(executor: PassingThread) -> None:
    first = executor.submit(threading.get_native_id).result()
    wait_for_end()
    second = executor.submit(threading.get_native_id).result()
    assert first != second


def test_each_thread_begins_with_the_initializer() -> None:
    begun: list[int] = []
    executor = PassingThread(NAME, lambda: begun.append(threading.get_ident()), idle_seconds=0.02)
    for expected in (1, 2):
        executor.submit(int).result()
        assert len(begun) == expected
        wait_for_end()


def test_an_error_reaches_who_asked_and_the_next_work_runs(executor: PassingThread) -> None:
    failed, next_one = executor.submit(int, "no number"), executor.submit(int, "7")
    with pytest.raises(ValueError, match="no number"):
        failed.result()
    assert next_one.result() == 7


def test_no_work_is_lost_when_it_comes_while_the_thread_ends() -> None:
    executor = PassingThread(NAME, idle_seconds=0.0)
    assert [executor.submit(int, number).result(10) for number in range(2_000)] == list(range(2_000))


def test_shut_down_it_forgets_what_waits_and_takes_no_more(executor: PassingThread) -> None:
    begun, end = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        end.wait(10)

    running, waiting = executor.submit(work), executor.submit(int)
    begun.wait(10)
    executor.shutdown(wait=False, cancel_futures=True)
    assert waiting.cancelled()
    with pytest.raises(RuntimeError):
        executor.submit(int)
    end.set()
    assert running.result(10) is None
