"""A role as the launcher sees one: says that it is ready, runs until SIGTERM, may have children. Stands in for `python -m server ROLE`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from server.launcher.leash import leash_command


def main() -> int:
    role = sys.argv[1]
    directory = Path(os.environ["DATA_DIRECTORY"]) / "roles"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{role}.database_url").write_text(os.environ["DATABASE_URL"])
    if role == "migrate":
        return 3 if (directory / "migrate.fails").exists() else 0
    if (directory / f"{role}.fails").exists():
        return 4
    # A child that ends with its parent, as a worker's children do.
    subprocess.Popen(leash_command(["/bin/sleep", "1000"], signal.SIGKILL))
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopping.append(number))
    with os.fdopen(int(sys.argv[sys.argv.index("--ready-fd") + 1]), "wb") as ready:
        ready.write(b"ready\n")
    while not stopping:
        signal.pause()
    with (directory / "stopped").open("a") as log:
        log.write(f"{role}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
