"""Takes from a process, for good, what reading a document does not need: memory and time beyond limits, files, network, other programs."""

import ctypes
import platform
import resource
import signal
import struct

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
# <linux/audit.h> and <asm/unistd.h> per machine: socket, socketpair, connect, execve, execveat, ptrace.
_MACHINES = {
    "x86_64": (0xC000003E, (41, 53, 42, 59, 322, 101)),
    "aarch64": (0xC00000B7, (198, 199, 203, 221, 281, 117)),
}
_X32_CALLS = 0x40000000  # the second numbering of x86_64
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # <linux/bpf_common.h>
_NUMBER_AT, _MACHINE_AT = 0, 4  # in struct seccomp_data
_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000 | 13  # EACCES
_OPEN_FILES = 64


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def confine(memory_bytes: int, seconds: int) -> None:
    """Confine this process: it dies with its parent's thread, and has so much address space and processor time.

    Where the kernel knows no filters of system calls (or the machine is another one), only the limits hold.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    _refuse_calls()


def _refuse_calls() -> bool:
    machine, calls = _MACHINES.get(platform.machine(), (0, ()))
    if not calls:
        return False
    instructions = [_step(_LOAD, _MACHINE_AT), _step(_EQUAL, machine, 0, len(calls) + 2), _step(_LOAD, _NUMBER_AT)]
    instructions.append(_step(_AT_LEAST, _X32_CALLS, len(calls) + 1, 0))
    instructions += [_step(_EQUAL, call, len(calls) - index, 0) for index, call in enumerate(calls)]
    instructions += [_step(_RETURN, _ALLOW), _step(_RETURN, _REFUSE)]
    buffer = ctypes.create_string_buffer(b"".join(instructions))
    program = _Program(len(instructions), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Write one instruction; the jumps count the instructions that are left out."""
    return struct.pack("=HBBI", code, if_true, if_false, value)
