"""LoRA adapters: read from a peft directory, checked tensor by tensor, and kept in one pool of ranks beside the base weights.

An adapter that cannot be computed exactly as peft computes it is refused; nothing in a file is ever left unused.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from server.domain.errors import FailedPrecondition, ResourceExhausted, Unimplemented
from server.inference.projections import AdapterSelection, Projection, RankPool

ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
TENSOR_KEY = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight$")
# Options of peft 0.21 under which an adapter is more than two matrices per layer. Unset or one of these values, they change nothing.
PLAIN_VALUES: tuple[object, ...] = (None, False, "", "none", (), {}, [])
UNSUPPORTED_OPTIONS = (
    "use_dora", "lora_bias", "bias", "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "velora_config", "monteclora_config", "arrow_config", "kasa_config",
)  # fmt: skip
# Ways to start the matrices that leave the base weights as they are. Others (pissa, olora, corda, …) change the base while training.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

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


def read_adapter(directory: Path, places: Places) -> Adapter:
    """Read a peft directory for a model whose projections are known by their module paths.

    Raises FailedPrecondition (ADAPTER_INVALID) for files that do not fit, Unimplemented (ADAPTER_NOT_SUPPORTED) for other methods.
    """
    config = _read_config(directory)
    try:
        tensors = load_file(directory / ADAPTER_WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise _invalid("its weights cannot be read") from error
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = TENSOR_KEY.match(key)
        if match is None or match["path"] not in places:
            raise _invalid(f"tensor {key!r} has no place in the base model")
        if not torch.isfinite(tensor).all():
            raise _invalid(f"tensor {key!r} is not finite")
        sides.setdefault(match["path"], {})[match["side"]] = tensor.float()
    if not sides:
        raise _invalid("it holds no tensor")
    matrices = {places[path]: _check_pair(path, pair, places[path], _find_scale(config, path, pair)) for path, pair in sides.items()}
    return Adapter(max(down.shape[0] for down, _ in matrices.values()), matrices)


def _read_config(directory: Path) -> Mapping[str, object]:
    try:
        config = json.loads((directory / ADAPTER_CONFIG_NAME).read_text())
    except (OSError, ValueError) as error:
        raise _invalid("its configuration cannot be read") from error
    if not isinstance(config, dict):
        raise _invalid("its configuration is not an object")
    if config.get("peft_type") != "LORA":
        raise _unsupported(f"method {config.get('peft_type')}")
    for option in UNSUPPORTED_OPTIONS:
        if config.get(option) not in PLAIN_VALUES:
            raise _unsupported(option)
    if config.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        raise _unsupported(f"init_lora_weights {config['init_lora_weights']!r}")
    return config


def _find_scale(config: Mapping[str, object], path: str, pair: Mapping[str, torch.Tensor]) -> float:
    """Compute alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732), with peft's per-module patterns."""
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    if isinstance(patterns, dict):
        alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), alpha)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or "A" not in pair:
        raise _invalid("its scale is not a number" if "A" in pair else f"{path!r} has no A matrix")
    rank = pair["A"].shape[0]
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_pair(
    path: str, pair: Mapping[str, torch.Tensor], place: tuple[Projection, int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    projection, part = place
    if set(pair) != {"A", "B"}:
        raise _invalid(f"{path!r} has only one of its two matrices")
    down, up = pair["A"], pair["B"]
    fits = down.dim() == up.dim() == 2 and down.shape[1] == projection.in_features and up.shape[0] == projection.part_features[part]
    if not fits or down.shape[0] != up.shape[1]:
        raise _invalid(f"{path!r} has matrices {tuple(down.shape)} and {tuple(up.shape)}, which the base model cannot take")
    return down, up * scale


def _invalid(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"The adapter cannot be loaded: {what}.", reason="ADAPTER_INVALID")


def _unsupported(what: str) -> Unimplemented:
    return Unimplemented(f"The adapter uses {what}, which this engine does not compute yet.", reason="ADAPTER_NOT_SUPPORTED")


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
        projection.pool = pool
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
