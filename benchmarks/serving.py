"""The whole service under load, through its gRPC: `python -m benchmarks.serving --part vllm|peers|streams|adapters`.

vllm: the engine `vllm` beside vLLM without a server. peers: the embedded engine beside the same. Both want VLLM_PYTHON. streams: the
embedded engine with 1 to 256 streams at once. adapters: 1,000 requests over 1 to 1,000 versions. SmolLM2, greedy. Ours and the peer run
one after the other. All parts of the service, the database and this client share the machine's cores.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import httpx
from transformers import AutoTokenizer

from benchmarks.inference import BASE_MODEL, PROMPT_TEXT, run_apart, save_adapters
from benchmarks.service import Service, run_service
from benchmarks.streams import Ask, Figures, percentile, run_streams
from server.basemodels.sources import BaseModelSource
from server.storage.artefacts import Artefact, ArtefactStore

STREAMS = 16
MIXES = (3, 8)  # adapters over which the streams go
SHORT_PROMPT_TOKENS, SHORT_NEW_TOKENS = 32, 24  # where there are many requests
LOAD_SECONDS = 1e-3  # whoever waited longer for an adapter found it not loaded
ALONE, FEW_TOKENS = 20, 8  # requests one after the other, for the first token, and what each may write
# The same for both sides: vLLM's defaults depend on whether it serves.
VLLM_LIMITS = {"max_model_len": 1024, "max_num_batched_tokens": 2048, "max_num_seqs": 128}
VLLM_ARGUMENTS = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in VLLM_LIMITS.items())
# And what the engine `vllm` sets by itself.
VLLM_SETTINGS: Mapping[str, Any] = {"enable_lora": True, "max_lora_rank": 64, "scheduling_policy": "priority", **VLLM_LIMITS}
VLLM_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
# With adapters, as one would set it up for them: room for all at once, and no more rank than they have.
ADAPTER_SETTINGS = {**VLLM_SETTINGS, "max_loras": 8, "max_lora_rank": 16}
LIMITS = {"MAX_CONCURRENT_GENERATIONS": "256", "MAX_QUEUED_GENERATIONS": "1000", "KV_CACHE_TOKENS": "81920"}


class Bench:
    """What all parts share: the base model, prompts that never repeat (a prefix cache would know them), and a place for files."""

    def __init__(self, directory: Path, cache: Path, options: argparse.Namespace) -> None:
        self.directory, self.cache, self.options = directory, cache, options
        self.model = BaseModelSource(cache).resolve(BASE_MODEL).directory
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.model)
        self._numbers = itertools.count()

    def make_ids(self, tokens: int) -> list[int]:
        """Make a new prompt of so many tokens, as ids."""
        text = f"Page {next(self._numbers)}. {PROMPT_TEXT * (tokens // 10)}"
        return list(self.tokenizer(text, add_special_tokens=False).input_ids[:tokens])

    def make_asks(self, models: Sequence[str], prompt_tokens: int, new_tokens: int) -> Sequence[Ask]:
        """Make a request with a new prompt for each of these models."""
        return [Ask(model, self.tokenizer.decode(self.make_ids(prompt_tokens)), new_tokens) for model in models]

    def run(self, service: Service, models: Sequence[str], at_once: int, prompt_tokens: int, new_tokens: int) -> Figures:
        """Send a request with a new prompt for each of these models, so many at a time."""
        return asyncio.run(run_streams(service.target, self.make_asks(models, prompt_tokens, new_tokens), at_once))

    def run_best(self, service: Service, models: Sequence[str]) -> Figures:
        """Give the best of some runs of a request for each of these models, all at once."""
        options = self.options
        runs = [self.run(service, models, len(models), options.prompt_tokens, options.new_tokens) for _ in range(options.repeats)]
        return max(runs, key=lambda figures: figures.rate)

    def make_adapters(self, storage: Path | None = None) -> Sequence[Artefact]:
        """Save adapters where a service looks for them."""
        root = storage or self.directory / "models"
        names = run_apart(0, save_adapters, self.model, root)
        return [ArtefactStore(root).open(name) for name in names]

    def ask_peer(self, order: Mapping[str, Any]) -> Any:
        """Let vLLM do what an order says, in a process of its own."""
        ordered, result = self.directory / "order.json", self.directory / "result.json"
        ordered.write_text(json.dumps({"new_tokens": self.options.new_tokens, **order}), "utf-8")
        program = Path(__file__).with_name("vllm_peer.py")
        subprocess.run([os.environ["VLLM_PYTHON"], program, ordered, result], env={**os.environ, **VLLM_VARIABLES}, check=True)
        return json.loads(result.read_text("utf-8"))


def measure_vllm(bench: Bench) -> None:
    """Measure the engine `vllm` through gRPC, after vLLM by itself."""
    settings = {**VLLM_SETTINGS, "model": str(bench.model), "enable_lora": bench.options.lora}
    tokens, arguments = bench.options.prompt_tokens, VLLM_ARGUMENTS + ("" if bench.options.lora else " --no-enable-lora")
    offline = bench.ask_peer({"kind": "offline", "settings": settings, "runs": [_make_run(bench, "base", [None] * STREAMS)]})["base"]
    prompts = [bench.make_ids(tokens) for _ in range(ALONE)]
    direct = bench.ask_peer({"kind": "first", "settings": settings, "new_tokens": FEW_TOKENS, "prompts": prompts})
    variables = {"ENGINE": "vllm", "VLLM_ARGUMENTS": arguments, **VLLM_VARIABLES}
    with run_service(bench.directory, bench.cache, BASE_MODEL, variables) as service:
        bench.run(service, [BASE_MODEL] * STREAMS, STREAMS, tokens, 8)
        before = service.measure("api").processor_seconds
        ours = bench.run_best(service, [BASE_MODEL] * STREAMS)
        cost = (service.measure("api").processor_seconds - before) / (ours.tokens * bench.options.repeats)
        known = _read_first_tokens(service)
        alone = bench.run(service, [BASE_MODEL] * ALONE, 1, tokens, FEW_TOKENS)
        seconds, count = (late - soon for late, soon in zip(_read_first_tokens(service), known, strict=True))
    print(f"vLLM offline, {STREAMS} requests           {offline:8.1f} tokens per second")
    print(f"engine vllm through gRPC, {STREAMS} streams{ours.rate:8.1f} tokens per second   {ours.rate / offline:5.3f}")
    print(f"api: {cost * 1e6:.0f} us of processor time per token, {cost * 500:.1%} of a core at 500 tokens per second")
    first = [stream.first_seconds * 1000 for stream in alone.streams]
    print(f"first token, alone: AsyncLLM in its process {median(direct) * 1000:6.1f} ms, through gRPC {median(first):6.1f} ms (medians)")
    served = fmean(first) - seconds / count * 1000
    print(f"first token, alone: {served:.1f} ms after vLLM's server had it (means of {count:.0f}; its own /metrics)")


def measure_peers(bench: Bench) -> None:
    """Measure the embedded engine through gRPC after vLLM by itself: the base model, and adapters."""
    artefacts = bench.make_adapters()
    directories = [str(artefact.directory) for artefact in artefacts]
    theirs: dict[str, float] = {}
    runs = [_make_run(bench, "one stream", [None]), _make_run(bench, f"{STREAMS} streams", [None] * STREAMS)]
    model = {"model": str(bench.model)}
    theirs |= bench.ask_peer({"kind": "offline", "settings": {**VLLM_SETTINGS, **model, "enable_lora": False}, "runs": runs})
    runs = [_make_run(bench, f"{STREAMS} streams over {count} adapters", _repeat(directories[:count], STREAMS)) for count in MIXES]
    theirs |= bench.ask_peer({"kind": "offline", "settings": {**ADAPTER_SETTINGS, **model}, "runs": runs})
    with run_service(bench.directory, bench.cache, BASE_MODEL, {}) as service:
        names = service.register(BASE_MODEL, artefacts, len(artefacts))
        asked: dict[str, Sequence[str]] = {"one stream": [BASE_MODEL], f"{STREAMS} streams": [BASE_MODEL] * STREAMS}
        asked |= {f"{STREAMS} streams over {count} adapters": _repeat(names[:count], STREAMS) for count in MIXES}
        for name, models in asked.items():
            bench.run(service, models, STREAMS, bench.options.prompt_tokens, 2)
            ours = bench.run_best(service, models)
            print(f"{name:28} engine through gRPC {ours.rate:8.1f}   vLLM offline {theirs[name]:8.1f}   {ours.rate / theirs[name]:5.2f}")


def measure_streams(bench: Bench) -> None:
    """Measure the embedded engine with more and more streams at once, and as few as 16 requests."""
    options = bench.options
    with run_service(bench.directory, bench.cache, BASE_MODEL, LIMITS) as service:
        bench.run(service, [BASE_MODEL] * STREAMS, STREAMS, options.prompt_tokens, 2)
        print("streams   tokens/s   first token p50   p99 ms   between tokens p50   p99 ms   api us/token   engine's peak MiB")
        for count in options.streams:
            before = service.measure("api").processor_seconds
            ours = bench.run(service, [BASE_MODEL] * max(count, STREAMS), count, options.prompt_tokens, options.new_tokens)
            cost = (service.measure("api").processor_seconds - before) / ours.tokens * 1e6
            first, gap = f"{ours.first_ms(50):15.0f} {ours.first_ms(99):8.0f}", f"{ours.gap_ms(50):18.1f} {ours.gap_ms(99):8.1f}"
            print(f"{count:7} {ours.rate:10.1f} {first} {gap} {cost:14.0f} {service.measure('engine').peak_bytes >> 20:15}", flush=True)


def measure_adapters(bench: Bench) -> None:
    """Measure requests over more and more versions, by Zipf's law (s = 1): the n-th version gets 1/n of the first one's share.

    The versions share eight adapters' files; to the engine, which names versions by their model, each is one of its own.
    """
    options = bench.options
    for count in options.adapters:
        with (
            tempfile.TemporaryDirectory(prefix="serving-") as directory,
            run_service(Path(directory), bench.cache, BASE_MODEL, {}) as service,
        ):
            names = service.register(BASE_MODEL, bench.make_adapters(service.storage), count)
            chosen = random.Random(1).choices(names, [1 / place for place in range(1, count + 1)], k=options.requests)  # noqa: S311
            ours = bench.run(service, chosen, STREAMS, SHORT_PROMPT_TOKENS, SHORT_NEW_TOKENS)
            cold = [stream.first_seconds for stream in ours.streams if stream.load_seconds >= LOAD_SECONDS]
            warm = [stream.first_seconds for stream in ours.streams if stream.load_seconds < LOAD_SECONDS]
            print(
                f"{count:5} versions, {len(set(chosen)):4} asked for: {ours.rate:7.1f} tokens per second, first token"
                f" cold ({len(cold)}) p50 {percentile(cold, 50) * 1000:6.0f} p99 {percentile(cold, 99) * 1000:6.0f} ms,"
                f" warm ({len(warm)}) p50 {percentile(warm, 50) * 1000:6.0f} p99 {percentile(warm, 99) * 1000:6.0f} ms,"
                f" engine's peak {service.measure('engine').peak_bytes >> 20} MiB",
                flush=True,
            )


def _repeat(names: Sequence[str], count: int) -> Sequence[str]:
    return [names[place % len(names)] for place in range(count)]


def _make_run(bench: Bench, name: str, adapters: Sequence[str | None]) -> Mapping[str, Any]:
    """Ask for a warm-up and the repeats of a run of the peer."""
    tokens = bench.options.prompt_tokens
    repeats = [[bench.make_ids(tokens) for _ in adapters] for _ in range(1 + bench.options.repeats)]
    return {"name": name, "adapters": list(adapters), "repeats": repeats}


def _read_first_tokens(service: Service) -> tuple[float, float]:
    """Give the seconds of all first tokens that vLLM's server of the base model counts, and their number."""
    [socket] = service.sockets.glob("vllm-*.sock")
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as client:
        text = client.get("http://vllm/metrics").text
    found = [re.search(rf"^vllm:time_to_first_token_seconds_{part}\{{[^}}]*\}} (\S+)", text, re.MULTILINE) for part in ("sum", "count")]
    seconds, count = (float(each[1]) if each else 0.0 for each in found)
    return seconds, count


PARTS = {"vllm": measure_vllm, "peers": measure_peers, "streams": measure_streams, "adapters": measure_adapters}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", required=True, help="may be given again")
    parser.add_argument("--cache", type=Path, default=Path(".data/cache"), help="where converted weights are kept")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--lora", action=argparse.BooleanOptionalAction, default=True, help="of the part vllm: whether it takes versions")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256], help="of the part streams")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 32, 256, 1000], help="of the part adapters: versions")
    parser.add_argument("--requests", type=int, default=1000, help="of the part adapters")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    for part in options.part:
        with tempfile.TemporaryDirectory(prefix="serving-") as directory:
            PARTS[part](Bench(Path(directory), options.cache, options))


if __name__ == "__main__":
    main()
