"""The command line: `python -m server ROLE`. Reads the settings and starts one role; knows nothing of how it works."""

import argparse
import os
import sys

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

# Read by libraries when torch is imported; an environment that sets them wins.
TORCH_ENVIRONMENT = {
    # OpenMP's threads spin while they wait, and where processes share cores that takes nearly all of the time
    # (training at load 12: 12 tokens per second with the default, 131 with this; on a quiet machine 10 % less than with the default).
    "GOMP_SPINCOUNT": "1000",
    # oneDNN keeps code for each shape of a product, 0.3 MB each, and ideep between it and torch keeps as much once more. Records of mixed
    # lengths give new shapes at each step: with the defaults, 1,024 of each, a training grows by 0.1 GB per step until it has 0.6 GB more.
    # A micro-batch uses some 100 shapes, over and over. Without the second cache products take as long as with it.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "1",
}
# The engine's threads wait awake for as long as two products lie apart; inference/spinning.py sees to it that they do only when alone.
ENGINE_ENVIRONMENT = TORCH_ENVIRONMENT | {"GOMP_SPINCOUNT": "20000"}
# Who imports torch. The others set nothing: their children would inherit it.
ENVIRONMENTS = {"engine": ENGINE_ENVIRONMENT, "train": TORCH_ENVIRONMENT, "index": TORCH_ENVIRONMENT, "batch": TORCH_ENVIRONMENT}


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
    # Before torch is.
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
