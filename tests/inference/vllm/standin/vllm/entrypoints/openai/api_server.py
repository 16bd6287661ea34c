"""Serves recorded completions at `--uds`. Answers of more than 100 tokens do not end."""

import argparse
import asyncio

from aiohttp import web

from tests.inference.openai.completion_server import CompletionServer, run_server

ENDLESS_TOKENS = 100


class Server(CompletionServer):
    """Ends its answers, or not, as it is asked."""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        if (await request.json())["max_tokens"] > ENDLESS_TOKENS:
            self.pieces = None
        return await super().complete(request)


async def main() -> None:
    """Serve until the end of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds")
    parser.add_argument("--served-model-name")
    named = parser.parse_known_args()[0]
    async with run_server(Server(named.served_model_name), socket=named.uds):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
