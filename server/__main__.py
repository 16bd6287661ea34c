"""The command line: `python -m server ROLE`. Reads the settings and starts one role; knows nothing of how it works."""

import argparse
import os
import sys

from server.environment import ENVIRONMENTS

ROLES = {
    "up": "everything on this machine: PostgreSQL, migrations, engine, worker, api, Envoy",
    "api": "the gRPC server",
    "worker": "claims jobs and runs each in a child process",
    "engine": "holds models, generates and embeds",
    "train": "one fine-tuning job; started by a worker",
    "index": "one RAG index job; started by a worker",
    "batch": "one batch generation; started by a worker",
    "inspect": "look through one file of records, under limits; started by the api",
    "migrate": "bring the database's tables up to date",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a role; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m server", description="The Model Training Service.")
    roles = parser.add_subparsers(dest="role", required=True, metavar="ROLE")
    for role, description in ROLES.items():
        role_parser = roles.add_parser(role, help=description)
        if role in ("train", "index", "batch"):
            role_parser.add_argument("--events-fd", type=int, required=True, help="descriptor that events are written to")
        elif role in ("api", "worker", "engine"):
            role_parser.add_argument("--ready-fd", type=int, help="descriptor that is told when the role is ready")
    options = parser.parse_args(arguments)
    if options.role == "inspect":  # reads no settings: it has no business with them
        from server.datafiles.inspection import run_inspection

        return run_inspection()
    # Before grpc is imported: children are started by exec, and its fork handlers can hang.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    # Before torch is. An environment that sets them wins.
    for name, value in ENVIRONMENTS.get(options.role, {}).items():
        os.environ.setdefault(name, value)

    from server.settings import Settings, SettingsError

    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as error:
        print(f"The configuration makes no sense:\n{error}", file=sys.stderr)
        return 2

    from server.app import run

    return run(options.role, settings, events_fd=getattr(options, "events_fd", None), ready_fd=getattr(options, "ready_fd", None))


if __name__ == "__main__":
    sys.exit(main())
