"""Children of this machine: their events, their log, their end."""

import asyncio
import sys
from pathlib import Path

import pytest

from server.domain.events import ChildEvent, Warned
from server.domain.orders import IndexOrder
from server.domain.specs import IndexSpec
from server.jobs.localchild import LocalExecution

ORDER = IndexOrder("job_1", 1, IndexSpec("e"), "documents", 0)
WARNING = '{"kind": "warning", "code": "A", "message": "b"}'


def _run(program: str) -> LocalExecution:
    # Called as `-c PROGRAM index --events-fd N`.
    return LocalExecution((sys.executable, "-c", f"import os, sys, time\nevents = os.fdopen(int(sys.argv[3]), 'w')\n{program}"))


async def _collect(program: str, log_path: Path) -> tuple[list[ChildEvent], str, str]:
    child = await _run(program).start(ORDER, log_path)
    try:
        events = [event async for batch in child.read_events() for event in batch]
        return events, (await child.wait()).description, child.read_log_tail()
    finally:
        await child.stop(0)
        child.close()


async def test_the_child_gets_its_role_and_its_order(tmp_path: Path) -> None:
    _, _, tail = await _collect("print(sys.argv[1], sys.stdin.readline())", tmp_path / "log")
    assert tail.startswith("index {")
    assert '"job_id":"job_1"' in tail


async def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    program = f"events.write('{WARNING}\\n' * 2 + '{WARNING[:20]}'); events.flush(); os.kill(os.getpid(), 9)"
    events, end, _ = await _collect(program, tmp_path / "log")
    assert events == [Warned("A", "b")] * 2
    assert end == "killed by SIGKILL"


@pytest.mark.parametrize(("number", "kills", "expected"), [(9, 1, True), (9, 0, False), (15, 1, False)])
async def test_a_kill_for_memory_is_told_from_other_kills(tmp_path: Path, number: int, kills: int, expected: bool) -> None:
    counts = iter([5, 5 + kills])
    program = f"import os; os.kill(os.getpid(), {number})"
    child = await LocalExecution((sys.executable, "-c", program), lambda: next(counts)).start(ORDER, tmp_path / "log")
    end = await child.wait()
    child.close()
    assert end.is_out_of_memory is expected


async def test_a_pause_reaches_the_child_alone(tmp_path: Path) -> None:
    # The grandchild would die of the signal; the child tells whether it lives.
    program = (
        "import signal, subprocess; heard = []; signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))\n"
        "other = subprocess.Popen(['/bin/sleep', '100'])\n"
        f"events.write('{WARNING}\\n'); events.flush()\n"
        "while not heard: time.sleep(0.01)\n"
        "time.sleep(0.2); print(other.poll())"
    )
    child = await _run(program).start(ORDER, tmp_path / "log")
    async for _ready in child.read_events():
        break
    child.pause()
    assert (await child.wait()).description == "exit code 0"
    child.pause()
    child.close()
    assert child.read_log_tail().endswith("None")


async def test_an_event_of_many_megabytes_arrives_whole(tmp_path: Path) -> None:
    program = 'events.write(\'{"kind": "warning", "code": "A", "message": "\' + \'x\' * 20_000_000 + \'"}\\n\')'
    events, end, _ = await _collect(program, tmp_path / "log")
    assert events == [Warned("A", "x" * 20_000_000)]
    assert end == "exit code 0"


async def test_nonsense_on_the_event_pipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a"):
        await _collect('events.write(\'{"kind": "surprise"}\\n\')', tmp_path / "log")


async def test_the_log_is_bounded_and_its_last_lines_are_known(tmp_path: Path) -> None:
    program = "for number in range(200): print(number, 'x' * 100_000)\nprint('the last words', end='')"
    _, _, tail = await _collect(program, tmp_path / "log")
    assert tail.endswith("\nthe last words")
    assert len(tail) < 20_000
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"log", "log.old"}
    assert max(sizes.values()) < 5 << 20
    assert (tmp_path / "log").read_text().endswith("the last words")


async def test_a_log_that_cannot_be_written_does_not_stop_the_child(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    events, end, tail = await _collect(f"print('hello'); events.write('{WARNING}\\n')", tmp_path / "file" / "log")
    assert (events, end, tail) == ([Warned("A", "b")], "exit code 0", "hello")


async def test_what_a_child_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    # The grandchild holds the event pipe and the log open: without a kill both would never end.
    program = "import subprocess; subprocess.Popen(['/bin/sleep', '1000'], pass_fds=(int(sys.argv[3]),))"
    events, end, _ = await asyncio.wait_for(_collect(program, tmp_path / "log"), 20)
    assert (events, end) == ([], "exit code 0")


async def test_a_program_that_does_not_exist_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        await LocalExecution(("/no/such/program",)).start(ORDER, tmp_path / "log")
    await asyncio.sleep(0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
