"""The similarity of unrelated texts is measured in the space itself, and a percentile of it lies where it says."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from server.domain.generation import EmbedRole
from server.domain.rag_indexes import Calibration
from server.rag.calibration import SUBJECTS, calibrate
from server.rag.embedding import Embedder
from tests.rag.conftest import MINILM
from tests.rag.tiny_encoders import build_tiny_xlm_roberta


def test_each_question_is_measured_with_the_passages_of_other_subjects(minilm: Embedder) -> None:
    calibration = calibrate(minilm.load(MINILM))
    # MiniLM spells Arabic letter by letter: there every text is like any other.
    subjects = [(question, passage) for question, passage in SUBJECTS if question.isascii()]
    questions = minilm.embed(MINILM, [question for question, _ in subjects], EmbedRole.QUERY)
    passages = minilm.embed(MINILM, [passage for _, passage in subjects], EmbedRole.PASSAGE)
    similarities = [float(q @ p) for i, q in enumerate(questions) for j, p in enumerate(passages) if i != j]
    assert calibration.pair_count == len(similarities) == len(subjects) * (len(subjects) - 1)
    assert (calibration.mean, calibration.deviation) == pytest.approx((np.mean(similarities), np.std(similarities)), abs=1e-5)
    assert calibration.similarities[0] == pytest.approx(min(similarities), abs=1e-5)
    assert calibration.similarities[-1] == pytest.approx(max(similarities), abs=1e-5)
    assert sum(one <= calibration.find_similarity(90) for one in similarities) == pytest.approx(0.9 * len(similarities), abs=2)


def test_questions_are_nearer_to_their_own_passages_than_unrelated_ones_are(minilm: Embedder) -> None:
    english = [(question, passage) for question, passage in SUBJECTS if question.isascii()]
    questions = minilm.embed(MINILM, [question for question, _ in english], EmbedRole.QUERY)
    passages = minilm.embed(MINILM, [passage for _, passage in english], EmbedRole.PASSAGE)
    assert (np.argmax(questions @ passages.T, axis=1) == np.arange(len(english))).all()


def test_another_space_has_another_distribution(
    minilm: Embedder, tmp_path: Path, embedder_of: Callable[[Mapping[str, Path]], Embedder]
) -> None:
    tiny = embedder_of({"tiny": build_tiny_xlm_roberta(tmp_path / "tiny")}).load("tiny")
    # It spells everything, so that all is measured.
    assert calibrate(tiny).pair_count == len(SUBJECTS) * (len(SUBJECTS) - 1)
    assert abs(calibrate(tiny).mean - calibrate(minilm.load(MINILM)).mean) > 0.05


@pytest.mark.parametrize(("percent", "similarity"), [(0, -0.1), (25, 0.05), (50, 0.2), (75, 0.4), (100, 0.6)])
def test_between_two_points_the_similarity_rises_in_a_straight_line(percent: float, similarity: float) -> None:
    calibration = Calibration(9, 0.2, 0.1, (0.0, 50.0, 100.0), (-0.1, 0.2, 0.6))
    assert calibration.find_similarity(percent) == pytest.approx(similarity)
