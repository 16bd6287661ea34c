"""One pool of adapter ranks beside the base weights: low-rank adapters of many requests, computed in one batch.

Knows no files: `adapterfiles.py` reads what is put in here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from server.domain.errors import ResourceExhausted
from server.inference.projections import Projection, RankPool
from server.inference.selection import AdapterSelection

Places = Mapping[str, tuple[Projection, int]]
Matrices = Mapping[tuple[Projection, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Adapter:
    """An adapter's matrices by projection and part: A [rank, in] and B [out, rank] with the scale folded in. Ranks may differ by layer."""

    rank: int
    matrices: Matrices


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter under the name by which a pool knows it; the same name always stands for the same files."""

    name: str
    adapter: Adapter


@dataclass
class _Resident:
    """An adapter in the pool: its ranks [first, last), how many requests use it, and when one last did."""

    first: int
    last: int
    users: int = 0
    last_use: int = 0


class AdapterPool:
    """Adapters side by side in one pool of ranks; the least recently used one that nobody uses makes room for another."""

    def __init__(self, places: Places, selection: AdapterSelection, *, dtype: torch.dtype, device: torch.device, max_ranks: int) -> None:
        self.places = places
        self._selection, self._dtype, self._device, self._max_ranks = selection, dtype, device, max_ranks
        self._projections = list({id(projection): projection for projection, _ in places.values()}.values())
        self._residents: dict[str, _Resident] = {}
        self._clock = 0

    @property
    def names(self) -> Sequence[str]:
        """Adapters in the pool."""
        return tuple(self._residents)

    def holds(self, name: str) -> bool:
        """Tell whether an adapter is in the pool."""
        return name in self._residents

    def acquire(self, name: str, adapter: Adapter) -> bool:
        """Put an adapter in the pool, if it is not there, and count one more user, for whom it stays.

        False when those in use leave no room for now. Raises ResourceExhausted when there never is.
        """
        if name not in self._residents and not self._insert(name, adapter):
            return False
        self._clock += 1
        resident = self._residents[name]
        resident.users, resident.last_use = resident.users + 1, self._clock
        return True

    def release(self, name: str) -> None:
        """Count one user less."""
        self._residents[name].users -= 1

    def evict(self, name: str) -> bool:
        """Drop an adapter; False while it is in use."""
        resident = self._residents.get(name)
        if resident is not None and resident.users > 0:
            return False
        self._residents.pop(name, None)
        return True

    def select(self, names: Sequence[str | None]) -> None:
        """Set the adapter of each row of the coming pass; None is the bare base."""
        ranges = [(0, 0) if name is None else (self._residents[name].first, self._residents[name].last) for name in names]
        self._selection.choose(ranges, self._device)

    def _insert(self, name: str, adapter: Adapter) -> bool:
        if adapter.rank > self._max_ranks:
            raise ResourceExhausted(
                f"The adapter's rank {adapter.rank} is over this engine's limit of {self._max_ranks}.", reason="ADAPTER_TOO_LARGE"
            )
        first = self._make_room(adapter.rank)
        if first is None:
            return False
        last = first + adapter.rank
        self._residents[name] = _Resident(first, last)
        targeted = {projection for projection, _ in adapter.matrices}
        for projection in self._projections:
            # A projection that no adapter ever touched has no pool, and costs nothing.
            if projection in targeted or projection.pool is not None:
                _fill(self._reserve(projection), projection, adapter, first, last)
        return True

    def _make_room(self, rank: int) -> int | None:
        """Find free neighbouring ranks: between the residents, in a larger pool, or where idle adapters leave, oldest first."""
        while True:
            first = self._find_gap(rank)
            if first is not None:
                return first
            idle = [name for name, resident in self._residents.items() if resident.users == 0]
            if not idle:
                return None
            self.evict(min(idle, key=lambda name: self._residents[name].last_use))

    def _find_gap(self, rank: int) -> int | None:
        end = 0
        for resident in sorted(self._residents.values(), key=lambda r: r.first):
            if resident.first - end >= rank:
                return end
            end = resident.last
        return end if end + rank <= self._max_ranks else None

    def _reserve(self, projection: Projection) -> RankPool:
        """Give a projection's pool, enlarged to twice its size or more where the residents need it; a rare copy, bounded by max_ranks."""
        parts, old = projection.part_features, projection.pool
        known = old.down.shape[0] if old is not None else 0
        needed = max((resident.last for resident in self._residents.values()), default=0)
        if old is not None and known >= needed:
            return old
        capacity = min(self._max_ranks, max(needed, 2 * known))
        down = torch.zeros(capacity, len(parts), projection.in_features, dtype=self._dtype, device=self._device)
        pool = RankPool(down, [torch.zeros(capacity, features, dtype=self._dtype, device=self._device) for features in parts])
        if old is not None:
            pool.down[:known] = old.down
            for new, kept in zip(pool.up, old.up, strict=True):
                new[:known] = kept
        projection.use(pool)
        return pool


def _fill(pool: RankPool, projection: Projection, adapter: Adapter, first: int, last: int) -> None:
    """Write an adapter's matrices to its ranks; zeros where it has none, or a smaller rank than elsewhere."""
    pool.down[first:last].zero_()
    for part, up in enumerate(pool.up):
        up[first:last].zero_()
        pair = adapter.matrices.get((projection, part))
        if pair is not None:
            pool.down[first : first + pair[0].shape[0], part] = pair[0].to(pool.down.dtype)
            up[first : first + pair[1].shape[1]] = pair[1].T.to(up.dtype)
