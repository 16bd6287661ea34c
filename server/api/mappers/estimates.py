"""Estimates: what a job is expected to need."""

from modeltraining.v1 import estimate_pb2

from server.api.mappers.findings import finding_to_proto
from server.api.mappers.values import enum_to_proto
from server.domain.estimates import Estimate, Range


def estimate_to_proto(estimate: Estimate) -> estimate_pb2.Estimate:
    """Write an estimate; what is not known stays unset."""
    return estimate_pb2.Estimate(
        memory_bytes=_range_to_proto(estimate.memory_bytes),
        device_memory_bytes=_range_to_proto(estimate.device_memory_bytes),
        disk_bytes=_range_to_proto(estimate.disk_bytes),
        steps=_range_to_proto(estimate.steps),
        tokens=_range_to_proto(estimate.tokens),
        duration_seconds=_range_to_proto(estimate.duration_seconds),
        verdict=enum_to_proto(estimate_pb2.Estimate.Verdict, "VERDICT", estimate.verdict),
        findings=[finding_to_proto(finding) for finding in estimate.findings],
    )


def _range_to_proto(figure: Range | None) -> estimate_pb2.Estimate.Range | None:
    return estimate_pb2.Estimate.Range(low=figure.low, expected=figure.expected, high=figure.high) if figure else None
