"""Evaluation of retrieval: queries with what answers them, ways to search, and what they reach."""

from modeltraining.v1 import evaluation_pb2
from modeltraining.v1 import inference_service_pb2 as pb

from server.api.mappers.retrieval import overrides_from_proto, settings_to_proto
from server.domain.retrieval_evaluation import Relevant, RetrievalComparison, RetrievalEvaluation, RetrievalQuery, RetrievalScores
from server.services.requests import Candidate, EvaluateRetrieval
from server.services.validation import Violations


def evaluate_from_proto(message: pb.EvaluateRetrievalRequest, found: Violations) -> EvaluateRetrieval:
    """Read an evaluation to make."""
    candidates = [
        Candidate(each.name, overrides_from_proto(each.retrieval, found, f"configurations[{place}].retrieval"))
        for place, each in enumerate(message.configurations)
    ]
    return EvaluateRetrieval(
        model_id=message.model_id,
        queries=[_query_from_proto(query) for query in message.queries],
        dataset_id=message.dataset_id,
        candidates=candidates,
        k_values=tuple(message.k_values),
        seed=message.seed if message.HasField("seed") else None,
        timeout_seconds=message.timeout_seconds if message.HasField("timeout_seconds") else None,
    )


def _query_from_proto(message: evaluation_pb2.RetrievalQuery) -> RetrievalQuery:
    relevant = [
        Relevant(
            document_id=each.document_id,
            char_start=each.char_start if each.HasField("char_start") else None,
            char_end=each.char_end if each.HasField("char_end") else None,
            quote=each.quote,
        )
        for each in message.relevant
    ]
    return RetrievalQuery(message.query, relevant)


def evaluation_to_proto(evaluation: RetrievalEvaluation) -> pb.EvaluateRetrievalResponse:
    """Write what was measured."""
    return pb.EvaluateRetrievalResponse(
        results=[_scores_to_proto(scores) for scores in evaluation.results],
        comparisons=[_comparison_to_proto(comparison) for comparison in evaluation.comparisons],
        query_count=evaluation.query_count,
        invalid_record_count=evaluation.invalid_record_count,
    )


def _scores_to_proto(scores: RetrievalScores) -> evaluation_pb2.RetrievalScores:
    message = evaluation_pb2.RetrievalScores
    return message(
        name=scores.name,
        retrieval=settings_to_proto(scores.settings),
        recall=[message.Recall(k=k, recall=recall) for k, recall in scores.recall],
        mrr_at_10=scores.mrr_at_10,
        ndcg_at_10=scores.ndcg_at_10,
        empty_rate=scores.empty_rate,
        latencies=[
            message.Latency(stage=each.stage, p50_seconds=each.p50_seconds, p99_seconds=each.p99_seconds) for each in scores.latencies
        ],
        missed_queries=scores.missed_queries,
    )


def _comparison_to_proto(comparison: RetrievalComparison) -> evaluation_pb2.RetrievalComparison:
    message = evaluation_pb2.RetrievalComparison
    differences = [
        message.Difference(measure=each.measure, difference=each.difference, low=each.low, high=each.high)
        for each in comparison.differences
    ]
    return message(name=comparison.name, baseline=comparison.baseline, differences=differences)
