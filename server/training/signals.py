"""How the work of a job learns that it shall end: looked at wherever ending leaves nothing half done."""

from server.childprocess import Signals


class Stopped(Exception):
    """The job was told to stop; nothing is saved."""


class PauseAsked(Exception):
    """The job was told to pause: whoever has something to save does so, then all ends."""


def check_stop(signals: Signals) -> None:
    """Raise Stopped if the job was told to stop."""
    if signals.should_stop():
        raise Stopped


def check_signals(signals: Signals) -> None:
    """Raise Stopped or PauseAsked if the job was told so."""
    check_stop(signals)
    if signals.should_pause():
        raise PauseAsked
