"""`up` over the roles of role_program: PostgreSQL, Envoy and the launcher itself are the real ones."""

import asyncio
import os
import sys

from server.launcher.up import run_up
from server.settings import Settings

if __name__ == "__main__":
    program = (sys.executable, "-m", "tests.launcher.role_program")
    sys.exit(asyncio.run(run_up(Settings.from_environment(os.environ), program)))
