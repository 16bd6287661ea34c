"""What this vLLM computes on: what STANDIN_DEVICE and STANDIN_BYTES say, else CPUs."""

import os


class Platform:
    """A kind of device."""

    device_type = os.environ.get("STANDIN_DEVICE", "cpu")

    @staticmethod
    def get_device_total_memory() -> int:
        """Give its bytes."""
        return int(os.environ["STANDIN_BYTES"])


current_platform = Platform()
