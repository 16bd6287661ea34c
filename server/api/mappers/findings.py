"""Findings of checks."""

from modeltraining.v1 import finding_pb2

from server.api.mappers.values import enum_to_proto
from server.domain.findings import Finding


def finding_to_proto(finding: Finding) -> finding_pb2.Finding:
    """Write a finding."""
    return finding_pb2.Finding(
        severity=enum_to_proto(finding_pb2.Finding.Severity, "SEVERITY", finding.severity),
        code=finding.code,
        message=finding.message,
        line=finding.line,
        field=finding.field,
        count=finding.count,
    )
