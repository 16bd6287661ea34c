"""What the machine that trains has: asked once, by the composition root."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory that one training job may take on host and accelerator, and cores. No accelerator: 0 bytes of it."""

    memory_bytes: int
    device_memory_bytes: int
    cores: int
