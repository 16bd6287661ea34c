"""Ids: prefixed, sortable, and nothing else passes for one."""

import time

import pytest

from server.domain.ids import JOB, MODEL, is_id, new_id


def test_ids_sort_by_the_time_they_were_made() -> None:
    made = []
    for _ in range(5):
        made.append(new_id(JOB))
        time.sleep(0.002)
    assert made == sorted(made)
    assert len({new_id(JOB) for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    "text",
    ["", "mdl_", "mdl_../../etc/passwd", "job_01k9zzzzzzzzzzzzzzzzzzzz", "mdl_" + "u" * 24, "mdl_" + "0" * 23, "mdl_" + "0" * 24 + "\n"],
)
def test_what_is_no_id_is_told(text: str) -> None:
    assert not is_id(text, MODEL)


def test_a_new_id_is_one_of_its_kind_only() -> None:
    assert is_id(new_id(MODEL), MODEL)
    assert not is_id(new_id(MODEL), JOB)
