"""vLLM's own throughput and first token, without a server: run by the Python that has vLLM, knows nothing of this project
(and the project's type checker nothing of vLLM).

`python vllm_peer.py ORDER RESULT`: a JSON file with the settings of the engine and the runs that are wanted, and one for their figures.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Do what the order says."""
    order = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    results = measure_offline(order) if order["kind"] == "offline" else asyncio.run(measure_first_tokens(order))
    Path(sys.argv[2]).write_text(json.dumps(results), "utf-8")


def measure_offline(order: dict[str, Any]) -> dict[str, float]:
    """Give LLM.generate's best tokens per second for each run: prompts as token ids, with an adapter's directory or none for each."""
    from vllm import LLM  # type: ignore[import-not-found]

    engine = LLM(**order["settings"])
    results = {}
    for run in order["runs"]:
        adapters = _make_adapters(run["adapters"])
        rates = []
        for number, prompts in enumerate(run["repeats"]):
            inputs = [{"prompt_token_ids": ids} for ids in prompts]
            parameters = _make_parameters(order["new_tokens"] if number else 2)  # the first warms up
            start = time.perf_counter()
            outputs = engine.generate(inputs, parameters, use_tqdm=False, lora_request=adapters)
            rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - start))
        results[run["name"]] = max(rates[1:])
    return results


async def measure_first_tokens(order: dict[str, Any]) -> list[float]:
    """Give the seconds to the first token of AsyncLLM, one request after the other."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**order["settings"]))
    seconds = []
    for number, ids in enumerate(order["prompts"]):
        start, first = time.perf_counter(), 0.0
        async for _ in engine.generate({"prompt_token_ids": ids}, _make_parameters(order["new_tokens"]), f"request-{number}"):
            first = first or time.perf_counter() - start
        seconds.append(first)
    engine.shutdown()
    del engine  # while what its end calls is still there
    return seconds


def _make_parameters(new_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=new_tokens)


def _make_adapters(directories: list[str | None]) -> list[Any] | None:
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    numbers = {name: number for number, name in enumerate(sorted({name for name in directories if name}), 1)}
    return [LoRARequest(name, numbers[name], name) if name else None for name in directories] if numbers else None


if __name__ == "__main__":
    main()
