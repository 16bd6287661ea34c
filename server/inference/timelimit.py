"""Python code of strangers (chat templates) with an end: what takes too long is interrupted from outside, wherever it loops."""

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# An interrupt is taken between two instructions of Python; one that is held in a library's code takes it when that returns.
INTERRUPT_SECONDS = 0.05


class _Interrupted(BaseException):
    """Thrown into the thread; no `except Exception` of its code catches it."""


def run_within(seconds: float, function: Callable[[], T]) -> T:
    """Run a function in a thread of its own and give its result. Raises TimeoutError where it takes longer, or what it raised."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:  # handed on to the caller, whatever it is
            errors.append(error)

    thread = threading.Thread(target=work, name="limited", daemon=True)
    thread.start()
    thread.join(seconds)
    while thread.is_alive() and not results and not errors:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Interrupted))
        thread.join(INTERRUPT_SECONDS)
    if results:
        return results[0]
    if isinstance(errors[0], _Interrupted):
        raise TimeoutError(f"it took longer than {seconds:g} s")
    raise errors[0]
