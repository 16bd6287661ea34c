"""Becomes another program that cannot outlive its starter: `leash PARENT SIGNAL USER [NAME=VALUE...] -- COMMAND...`.

The kernel sends SIGNAL to the program when the process PARENT ends in any way, kill -9 included. With a USER (`-` for none) the
program runs as that account. Each NAME=VALUE joins its environment. Standard library only: this runs before each part of the stack.
"""

import ctypes
import os
import pwd
import signal
import sys
from collections.abc import Mapping, Sequence

_LIBC = "libc.so.6"
# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
# <linux/capability.h>
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE = 1
_NO_USER = "-"
_END = "--"


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilitySet(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def leash_command(
    command: Sequence[str], death_signal: signal.Signals, user: str | None = None, variables: Mapping[str, str] | None = None
) -> list[str]:
    """Wrap `command` so that it gets `death_signal` when this process ends. Must be started by the main thread."""
    assignments = [f"{name}={value}" for name, value in (variables or {}).items()]
    wrapper = [sys.executable, "-m", __name__, str(os.getpid()), str(int(death_signal)), user or _NO_USER, *assignments, _END]
    return [*wrapper, *command]


def die_with_parent(parent: int, death_signal: int) -> None:
    """Ask the kernel for `death_signal` when the thread that started this process ends; leave at once where `parent` is gone already."""
    _call("prctl", _PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def become(user: str) -> None:
    """Turn from root into `user`, still able to reach files as root does.

    PostgreSQL refuses to run as root, yet its binaries and data may lie below a directory that only root may enter (/root). Keeping
    the one capability for that opens no directory to anybody else.
    """
    account = pwd.getpwnam(user)
    _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    bit = 1 << _CAP_DAC_OVERRIDE
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    sets = (_CapabilitySet * 2)(_CapabilitySet(bit, bit, bit), _CapabilitySet(0, 0, 0))
    _call("capset", ctypes.byref(header), ctypes.byref(sets))
    _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0)


def _call(function: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(_LIBC, use_errno=True), function)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{function}: {os.strerror(error)}")


def main(arguments: Sequence[str]) -> None:
    """Put the leash on and become the command."""
    end = arguments.index(_END)
    (parent, death_signal, user, *assignments), command = arguments[:end], arguments[end + 1 :]
    for assignment in assignments:
        os.putenv(*assignment.split("=", 1))
    if user != _NO_USER:
        become(user)
    # After the change of user, which clears it.
    die_with_parent(int(parent), int(death_signal))
    os.execv(command[0], list(command))  # noqa: S606  # the very purpose: no shell, no second process


if __name__ == "__main__":
    main(sys.argv[1:])
