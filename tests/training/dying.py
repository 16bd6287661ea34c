"""A job that dies in the middle: in a fresh process, since one that has computed with threads must not fork."""

import multiprocessing
import os
import signal

import torch

from server.domain.events import StepDone
from tests.training.building import Workplace

# The server of forks has imported torch and computed nothing: a fork of it starts at once, with threads of its own.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


def kill_after(step: int, workplace: Workplace) -> list[str]:
    """Do the job in a process that kills itself with signal 9 right after a step; give the checkpoints it left."""
    child = _FORKS.Process(target=_train_and_die, args=(step, workplace, torch.get_num_threads()))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    return sorted(path.name for path in workplace.store.locate("default/jobs/job_1").iterdir())


def _train_and_die(step: int, workplace: Workplace, threads: int) -> None:
    torch.set_num_threads(threads)  # sums over another number of threads are other sums
    workplace.train(emit=lambda event: os.kill(os.getpid(), signal.SIGKILL) if isinstance(event, StepDone) and event.step == step else None)
