"""How the demo prints: headings, a progress bar, answers side by side. It knows no service."""

import shutil
import sys
import textwrap
import time
from itertools import zip_longest

BAR_CHARACTERS = 28
INDENT = "   "
# Where the output is no terminal (a log), one progress line per so many seconds is enough.
LOG_INTERVAL_SECONDS = 10.0


class Screen:
    """Writes to standard output, and counts the chapters and the time."""

    def __init__(self) -> None:
        self._start_seconds = time.monotonic()
        self._chapter = 0
        self._is_terminal = sys.stdout.isatty()
        self._line_open = False
        self._last_bar_seconds = 0.0
        self.width = min(shutil.get_terminal_size((110, 40)).columns, 120)

    @property
    def elapsed_seconds(self) -> float:
        """Time since the demo began."""
        return time.monotonic() - self._start_seconds

    def chapter(self, title: str) -> None:
        """Begin a numbered part."""
        self._chapter += 1
        self.line()
        print(f"{self._chapter}. {title}   [{duration(self.elapsed_seconds)}]", flush=True)

    def line(self, text: str = "") -> None:
        """Print a line of its own."""
        self._end_line()
        print(f"{INDENT}{text}".rstrip(), flush=True)

    def piece(self, text: str) -> None:
        """Print a piece of streamed text where the last one ended."""
        print(("" if self._line_open else f"{INDENT}  ") + text.replace("\n", f"\n{INDENT}  "), end="", flush=True)
        self._line_open = self._line_open or bool(text)

    def bar(self, fraction: float, text: str) -> None:
        """Show how far something is, in place on a terminal, now and then in a log."""
        if not self._is_terminal and fraction < 1.0 and time.monotonic() - self._last_bar_seconds < LOG_INTERVAL_SECONDS:
            return
        self._last_bar_seconds = time.monotonic()
        done = round(BAR_CHARACTERS * min(max(fraction, 0.0), 1.0))
        row = f"{INDENT}[{'█' * done}{'·' * (BAR_CHARACTERS - done)}] {fraction:4.0%}  {text}"
        if self._is_terminal:
            print("\r\x1b[K" + row[: self.width], end="", flush=True)
            self._line_open = True
        else:
            print(row, flush=True)

    def columns(self, left: str, right: str) -> None:
        """Print two texts side by side, wrapped."""
        width = (self.width - 8) // 2
        for one, other in zip_longest(_wrapped(left, width), _wrapped(right, width), fillvalue=""):
            self.line(f"  {one:<{width}} │ {other}")

    def _end_line(self) -> None:
        if self._line_open:
            print(flush=True)
            self._line_open = False


def duration(seconds: float) -> str:
    """Write seconds as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width) or [""]
