"""`make demo`: starts the whole stack on free ports in a temporary directory, runs the demo client against it, stops it again."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

from examples import demo

STOP_SECONDS = 60.0


def main() -> int:
    """Run the demo; return 0 only if all of it went well and nothing is left running."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="model-training-demo-", ignore_cleanup_errors=True) as directory:
        http_port, grpc_port = find_free_ports(2)
        environment = {
            **os.environ,
            "DATA_DIRECTORY": directory,
            "HTTP_PORT": str(http_port),
            "GRPC_PORT": str(grpc_port),
            "LOG_LEVEL": "WARNING",
        }
        stack = subprocess.Popen([sys.executable, "-m", "server", "up"], env=environment, start_new_session=True)
        try:
            code = demo.main(["--url", f"http://127.0.0.1:{http_port}"])
        finally:
            stopped = stop(stack)
    print(f"\nThe stack is stopped. All of it took {time.monotonic() - started:.0f} seconds.")
    return code or stopped


def find_free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on (held open together, so that they differ)."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def stop(stack: "subprocess.Popen[bytes]") -> int:
    """Stop as Ctrl-C does; return the exit code, or 1 where it had to be killed."""
    stack.send_signal(signal.SIGINT)
    try:
        return stack.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        stack.kill()
        print("The stack did not stop in time and was killed.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
