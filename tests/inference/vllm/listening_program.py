"""A program that listens on a unix socket after a while, ends before, or never does either: `python -m … SOCKET (serve | fail | hang)`."""

import asyncio
import sys
import time

from aiohttp import web


async def main(socket: str) -> None:
    """Answer until the end of the process."""
    application = web.Application()

    async def list_models(_: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": "llama", "owned_by": "vllm", "max_model_len": 200}]})

    application.router.add_get("/v1/models", list_models)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.UnixSite(runner, socket).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[2] == "fail":
        sys.exit(1)
    if sys.argv[2] == "hang":
        time.sleep(600)
    asyncio.run(main(sys.argv[1]))
