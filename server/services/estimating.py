"""What a fine-tuning will need, before it starts: memory, disk, steps, tokens, time; whether it fits, and what would make it fit."""

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from server.domain.catalogue import find_base_model
from server.domain.datasets import Dataset
from server.domain.errors import FailedPrecondition
from server.domain.estimates import Estimate, Range, Verdict
from server.domain.findings import Finding, Severity
from server.domain.shapes import ModelShape
from server.domain.specs import FineTuneSpec, TrainingParameters
from server.domain.techniques import FullTechnique, LoraTechnique, QloraTechnique, Technique
from server.services.machine import Machine
from server.services.memory_model import DEFAULT_MICRO_BATCH_TOKENS, estimate_disk, estimate_flops_per_token, estimate_memory
from server.services.model_ports import BaseModels
from server.services.ports import TrainingSpeed
from server.services.record_lengths import InlineRecords, LengthMeasurer, RecordLengths

# How far the memory model was off, over techniques and families.
MEMORY_SPREAD = (0.85, 1.2)
# Where nothing was trained here yet: bf16 products of one core, floating point operations per second, and of an accelerator.
CORE_FLOPS = (3e10, 1.5e11, 4e11)
DEVICE_FLOPS = (1e14, 3e14, 6e14)
# Loading, tokenising, saving and trying a small model; loading a big one reads its weights three times at so many bytes per second.
START_SECONDS = (8.0, 15.0, 60.0)
READ_BYTES_PER_SECOND = 1e9
TIGHT_SHARE = 0.9  # of the memory: above it a warning
MIN_MICRO_BATCH_TOKENS = 256
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class SeenSpeed:
    """How fast something was trained here: tokens per second, and floating point operations per second where its shape is known."""

    base_model: str
    technique: str
    tokens_per_second: float
    flops_per_second: float | None


class Estimator:
    """Estimates fine-tunings on one machine."""

    def __init__(self, base_models: BaseModels, machine: Machine, measurer: LengthMeasurer) -> None:
        self._base_models = base_models
        self._machine = machine
        self._measurer = measurer

    async def estimate(self, spec: FineTuneSpec, source: Dataset | InlineRecords, speeds: Sequence[TrainingSpeed]) -> Estimate | None:
        """Estimate a fine-tuning on a dataset; None where nothing is known of the base model's shape yet."""
        shape = await asyncio.to_thread(self._base_models.read_shape, spec.base_model)
        if shape is None:
            return None
        records = max(1, source.record_count - math.floor(source.record_count * spec.eval_fraction))
        lengths = (await self._measurer.measure(spec, source)).scale(records / max(1, source.record_count))
        seen = [self._judge_speed(speed) for speed in speeds]
        return estimate_fine_tune(spec, shape, records, lengths, self._machine, seen)

    def _judge_speed(self, speed: TrainingSpeed) -> SeenSpeed:
        known = find_base_model(speed.spec.base_model)
        flops = estimate_flops_per_token(known.shape, speed.spec.technique) * speed.tokens_per_second if known else None
        return SeenSpeed(speed.spec.base_model, speed.spec.technique.kind, speed.tokens_per_second, flops)


def estimate_fine_tune(
    spec: FineTuneSpec, shape: ModelShape, records: int, lengths: RecordLengths, machine: Machine, speeds: Sequence[SeenSpeed]
) -> Estimate:
    """Estimate a fine-tuning of `records` training records."""
    parameters = spec.parameters
    passes = parameters.max_steps * parameters.batch_size / records if parameters.max_steps else parameters.epochs
    steps = parameters.max_steps or max(1, math.ceil(records * parameters.epochs / parameters.batch_size))
    tokens = _scale(lengths.total, passes)
    memory = _spread(estimate_memory(shape, spec.technique, parameters, lengths.longest).total)
    on_device = machine.device_memory_bytes > 0
    verdict, findings = _judge(spec, shape, lengths.longest, memory, machine)
    return Estimate(
        verdict=verdict,
        memory_bytes=_spread(float(2 * GIB)) if on_device else memory,
        device_memory_bytes=memory if on_device else None,
        disk_bytes=_spread(estimate_disk(shape, spec.technique, lengths.total.expected)),
        steps=Range(steps if parameters.early_stopping is None else 1, steps, steps),
        tokens=tokens,
        duration_seconds=_estimate_time(spec, shape, tokens, machine, speeds),
        findings=findings,
    )


def refuse_if_too_big(estimate: Estimate) -> None:
    """Raise FailedPrecondition where a job cannot fit, with the change that would make it fit."""
    if estimate.verdict is Verdict.FITS:
        return
    sentences = " ".join(finding.message for finding in estimate.findings if finding.severity is Severity.ERROR)
    changes = "; ".join(finding.message for finding in estimate.findings if finding.code == "WOULD_FIT_WITH")
    raise FailedPrecondition(sentences, reason="DOES_NOT_FIT", metadata={"verdict": estimate.verdict, "suggestion": changes})


def _judge(spec: FineTuneSpec, shape: ModelShape, longest: int, memory: Range, machine: Machine) -> tuple[Verdict, tuple[Finding, ...]]:
    available = machine.device_memory_bytes or machine.memory_bytes
    if memory.expected <= available:
        if memory.high <= TIGHT_SHARE * available:
            return Verdict.FITS, ()
        tight = f"About {_gib(memory.expected)} of {_gib(available)} are expected: it may run out of memory."
        return Verdict.FITS, (Finding(None, "MEMORY_TIGHT", tight, Severity.WARNING),)
    where = "the accelerator has" if machine.device_memory_bytes else "a training job may take"
    too_big = Finding(None, "DOES_NOT_FIT", f"The job needs about {_gib(memory.expected)} of memory, and {where} {_gib(available)}.")
    for change, technique, parameters in _list_changes(spec.technique, spec.parameters):
        needed = estimate_memory(shape, technique, parameters, longest).total
        if needed <= TIGHT_SHARE * available:
            advice = Finding(None, "WOULD_FIT_WITH", f"With {change} it needs about {_gib(needed)} and fits.")
            return Verdict.FITS_WITH, (too_big, advice)
    smallest = Finding(None, "CHOOSE_SMALLER_MODEL", "No technique makes it fit: choose a smaller base model.")
    return Verdict.DOES_NOT_FIT, (too_big, smallest)


def _list_changes(technique: Technique, parameters: TrainingParameters) -> Iterator[tuple[str, Technique, TrainingParameters]]:
    """Name changes that save memory, those first that change least, and give what they lead to."""
    saving = replace(parameters, gradient_checkpointing=True)
    small = replace(saving, micro_batch_tokens=min(MIN_MICRO_BATCH_TOKENS, parameters.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS))
    steps = [("parameters.gradient_checkpointing true", saving)]
    steps.append((f"parameters.gradient_checkpointing true and parameters.micro_batch_tokens {small.micro_batch_tokens}", small))
    for change, changed in steps:
        yield change, technique, changed
    others: list[Technique] = []
    if isinstance(technique, FullTechnique):
        others.append(LoraTechnique())
    if not isinstance(technique, QloraTechnique):
        others.append(QloraTechnique())
    for other in others:
        yield f"technique {other.kind}", other, parameters
        for change, changed in steps:
            yield f"technique {other.kind}, {change}", other, changed


def _estimate_time(spec: FineTuneSpec, shape: ModelShape, tokens: Range, machine: Machine, speeds: Sequence[SeenSpeed]) -> Range:
    """Estimate the seconds from start to end by what was seen here: the same model and technique first, then any by its arithmetic."""
    flops = estimate_flops_per_token(shape, spec.technique)
    alike = [each.tokens_per_second for each in speeds if (each.base_model, each.technique) == (spec.base_model, spec.technique.kind)]
    rates = [each.flops_per_second for each in speeds if each.flops_per_second]
    if alike:
        rate = _around(median(alike), 0.7, 1.4)
    elif rates:
        rate = _around(median(rates) / flops, 0.4, 2.0)
    else:
        low, expected, high = DEVICE_FLOPS if machine.device_memory_bytes else (each * machine.cores for each in CORE_FLOPS)
        rate = Range(low / flops, expected / flops, high / flops)
    loading = 3 * shape.parameter_count * 2 / READ_BYTES_PER_SECOND
    fastest, usual, slowest = (seconds + loading for seconds in START_SECONDS)
    return Range(tokens.low / rate.high + fastest, tokens.expected / rate.expected + usual, tokens.high / rate.low + slowest)


def _spread(expected: float) -> Range:
    return _around(expected, *MEMORY_SPREAD)


def _around(expected: float, low: float, high: float) -> Range:
    return Range(low * expected, expected, high * expected)


def _scale(figure: Range, factor: float) -> Range:
    return Range(figure.low * factor, figure.expected * factor, figure.high * factor)


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
