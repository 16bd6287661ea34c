"""The table of transitions."""

import pytest

from server.domain.jobs import HELD_STATES, TERMINAL_STATES, TRANSITIONS, JobState, cancelled_from, may_follow


def test_terminal_states_never_change() -> None:
    assert {JobState.SUCCEEDED, JobState.CANCELLED, JobState.FAILED} == TERMINAL_STATES
    assert not any(may_follow(state, following) for state in TERMINAL_STATES for following in JobState)


@pytest.mark.parametrize("state", [state for state in JobState if state not in TERMINAL_STATES])
def test_every_state_that_is_not_terminal_can_be_cancelled(state: JobState) -> None:
    reached = cancelled_from(state)
    assert reached is state or may_follow(state, reached)
    assert reached in (JobState.CANCELLED, JobState.CANCELLING)
    assert (reached is JobState.CANCELLING) == (state in HELD_STATES)


def test_success_is_reached_through_finalizing_alone() -> None:
    assert [state for state, following in TRANSITIONS.items() if JobState.SUCCEEDED in following] == [JobState.FINALIZING]


def test_every_state_but_the_first_can_be_reached() -> None:
    reached = {following for states in TRANSITIONS.values() for following in states}
    assert reached == set(JobState) - {JobState.VALIDATING}
