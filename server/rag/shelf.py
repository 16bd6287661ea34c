"""Models that are held in memory within a budget of bytes; the one not used for longest leaves first. Knows no torch."""

import json
import math
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import psutil

from server.domain.errors import ResourceExhausted

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NumberBytes:
    """What one number takes in memory: of a matrix that states are multiplied by, and of all else, tables of words among it."""

    matrix: int
    other: int


FLOAT32 = NumberBytes(4, 4)


class Shelf:
    """Any thread may use it. One model is loaded at a time: two that load together would need twice the memory at its peak."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` of weights, of all models together."""
        self._max_bytes = max_bytes
        self._held: OrderedDict[str, tuple[object, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def take(self, kind: type[T], name: str, find: Callable[[], Path], load: Callable[[Path], T], numbers: NumberBytes = FLOAT32) -> T:
        """Give a model of a kind, loaded from the directory that `find` gives where it is not held.

        `numbers` says what its weights take once it is loaded. Raises ResourceExhausted where it needs more memory than there is, and
        what `find` and `load` raise.
        """
        key = f"{kind.__name__} {name}"
        if (held := self._find(key)) is not None:
            return cast(T, held)
        with self._loading:
            if (held := self._find(key)) is not None:
                return cast(T, held)
            directory = find()
            size_bytes = measure_weights(directory, numbers)
            # Before its matrices are made small they are read as they are.
            self._make_room(name, size_bytes, measure_weights(directory, NumberBytes(numbers.other, numbers.other)))
            model = load(directory)
            with self._lock:
                self._held[key] = (model, size_bytes)
            return model

    def has(self, kind: type[object], name: str) -> bool:
        """Tell whether a model is held."""
        with self._lock:
            return f"{kind.__name__} {name}" in self._held

    def _find(self, key: str) -> object | None:
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key][0]

    def _make_room(self, name: str, size_bytes: int, loading_bytes: int) -> None:
        with self._lock:
            if size_bytes <= self._max_bytes:
                while self._held and size_bytes + sum(size for _, size in self._held.values()) > self._max_bytes:
                    self._held.popitem(last=False)
        for needed, room in ((size_bytes, self._max_bytes), (loading_bytes, psutil.virtual_memory().available)):
            if needed <= room:
                continue
            why = f"{name} takes {needed >> 20:,} MiB of memory, and there are {room >> 20:,} MiB for it."
            raise ResourceExhausted(why, reason="ENGINE_OUT_OF_MEMORY", metadata={"model": name})


def measure_weights(directory: Path, numbers: NumberBytes = FLOAT32) -> int:
    """Give the bytes that the weights below a directory take in memory, by the headers of its safetensors; 0 for none."""
    return sum(_measure_file(path, numbers) for path in directory.rglob("*.safetensors"))


def _measure_file(path: Path, numbers: NumberBytes) -> int:
    # https://huggingface.co/docs/safetensors: eight bytes of length, then JSON. A damaged file is told by the one that loads it.
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        return sum(math.prod(shape) * (numbers.matrix if _is_matrix(name, shape) else numbers.other) for name, shape in shapes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return 0


def _is_matrix(name: str, shape: list[int]) -> bool:
    return len(shape) == 2 and "embedding" not in name
