"""What vLLM computes on, by its own word, and how much of whose memory a server of it takes there. Imports no vLLM."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.domain.errors import FailedPrecondition
from server.inference.memory import MemoryBudget

ASK_DEVICE = (
    "from vllm.platforms import current_platform as platform; "
    "print(platform.device_type, 0 if platform.device_type == 'cpu' else platform.get_device_total_memory())"
)
# Of a GPU's memory each server takes this share at its start, for weights and KV cache, where its arguments name no other
# (vLLM 0.32, CacheConfig.gpu_memory_utilization).
SHARE_ARGUMENT, DEFAULT_SHARE = "--gpu-memory-utilization", 0.92


@dataclass(frozen=True)
class Device:
    """A kind of device. `memory` is what servers on it share; `server_bytes` what each takes, None: its weights."""

    is_cpu: bool
    memory: MemoryBudget
    server_bytes: int | None = None

    def measure_bytes(self, directory: Path) -> int:
        """Give what a server of the model there takes of `memory`. Blocking."""
        return self.server_bytes or measure_weights(directory)


def measure_weights(directory: Path) -> int:
    """Give the bytes of a model's weights as they lie in its files. Blocking."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


async def find_device(python: Path, arguments: Sequence[str], host_memory: MemoryBudget) -> Device:
    """Ask vLLM. Raises FailedPrecondition where there is none."""
    process = await asyncio.create_subprocess_exec(str(python), "-c", ASK_DEVICE, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    if process.returncode != 0:
        raise FailedPrecondition("There is no vLLM that runs in VLLM_PYTHON.", reason="VLLM_MISSING")
    kind, total_bytes = printed.decode().split()[-2:]
    if kind == "cpu":
        return Device(is_cpu=True, memory=host_memory)
    total = int(total_bytes)
    return Device(is_cpu=False, memory=MemoryBudget(total, host_memory.idle_seconds), server_bytes=int(total * _read_share(arguments)))


def _read_share(arguments: Sequence[str]) -> float:
    """Read the share from a server's arguments, the last one where there are several; both ways of writing it."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    places = [place for place, word in enumerate(words[:-1]) if word == SHARE_ARGUMENT]
    return float(words[places[-1] + 1]) if places else DEFAULT_SHARE
