"""Tokens per second of the embedded engine beside transformers' generate, in one run: `python -m benchmarks.inference`.

Greedy, prompts of 128 tokens, 128 new ones. The engine is measured through its async interface, with 16 requests that arrive over time.
Each side has a process of its own, transformers with torch's defaults, the engine with the environment that its role starts with. Tokens
per second of processor time are printed too: with one thread they hold on a machine that others use as well.
"""

import argparse
import asyncio
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.basemodels.loading import preferred_dtype
from server.basemodels.sources import BaseModelSource
from server.childprocess import measure_peak_memory
from server.domain.generation import GenerationFinished, GenerationParameters, GenerationRequest, ModelReference
from server.environment import ENGINE_ENVIRONMENT
from server.inference.batching import BatchLimits
from server.inference.engine import EmbeddedEngine
from server.inference.library import LoadingOptions
from server.storage.artefacts import ArtefactStore

P = ParamSpec("P")
T = TypeVar("T")
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT_TEXT = "The harbour master of a small town keeps a book of every ship that comes and goes, with its cargo and its captain. "
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STREAMS = 16
ADAPTERS = 8
RANK = 16
ARRIVAL_SECONDS = 0.02


@dataclass(frozen=True)
class Directory:
    """Resolves every name to one directory."""

    directory: Path
    revision: str = "the only one"

    def resolve(self, _: str, __: str | None = None) -> "Directory":
        """Give it."""
        return self


@dataclass(frozen=True)
class Figure:
    """Tokens per second by the clock and per second of processor time, and the mean seconds to the first token where they are known."""

    rate: float
    processor_rate: float
    first_token_seconds: float = 0.0


class Clock:
    """Measures from its making on."""

    def __init__(self) -> None:
        self._start, self._processor_start = time.perf_counter(), time.process_time()

    def rate(self, tokens: int, first_token_seconds: float = 0.0) -> Figure:
        """Turn a number of tokens made since then to a figure."""
        wall, processor = time.perf_counter() - self._start, time.process_time() - self._processor_start
        return Figure(tokens / wall, tokens / processor, first_token_seconds)


@dataclass(frozen=True)
class Load:
    """What is asked in a measurement."""

    prompt: str
    new_tokens: int
    repeats: int


def make_prompt(directory: Path, tokens: int) -> str:
    """Make a text of so many tokens, as near as the tokenizer allows."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    text = PROMPT_TEXT * (tokens // 10)
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:tokens]))


def measure_transformers(directory: Path, load: Load, rows: int) -> Figure:
    """Give generate's tokens per second for a static batch of equal prompts."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=preferred_dtype())
    ids = torch.tensor([tokenizer(load.prompt, add_special_tokens=False).input_ids] * rows)
    lengths = {"max_new_tokens": load.new_tokens, "min_new_tokens": load.new_tokens, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=2, do_sample=False, pad_token_id=0)
        figures = []
        for _ in range(load.repeats):
            clock = Clock()
            model.generate(ids, attention_mask=torch.ones_like(ids), **lengths)
            figures.append(clock.rate(rows * load.new_tokens))
    return max(figures, key=lambda figure: figure.rate)


async def ask(engine: EmbeddedEngine, load: Load, adapter: str | None, delay_seconds: float) -> tuple[int, float]:
    """Send one request; give its completion tokens and the seconds to its first token."""
    await asyncio.sleep(delay_seconds)
    # The prompt is one that the model continues at length: a bias against ending would cost time in each step.
    parameters = GenerationParameters(max_tokens=load.new_tokens, temperature=0.0)
    reference = ModelReference(adapter or "base", "base", version=1 if adapter else None, adapter_path=adapter)
    async for event in engine.generate(GenerationRequest("r", reference, parameters, prompt=load.prompt)):
        if isinstance(event, GenerationFinished):
            return event.usage.completion_tokens, event.timings.first_token_seconds
    raise RuntimeError("the stream was cut")


async def measure_engine(engine: EmbeddedEngine, load: Load, adapters: Sequence[str | None]) -> Figure:
    """Run one request per entry, arriving over time; give the best run."""
    figures = []
    for _ in range(load.repeats):
        clock = Clock()
        answers = await asyncio.gather(*(ask(engine, load, name, i * ARRIVAL_SECONDS) for i, name in enumerate(adapters)))
        figures.append(clock.rate(sum(tokens for tokens, _ in answers), sum(seconds for _, seconds in answers) / len(answers)))
    return max(figures, key=lambda figure: figure.rate)


def save_adapters(directory: Path, target: Path) -> list[str]:
    """Save random adapters over all linear layers."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    peft: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS))
    names = []
    for number in range(ADAPTERS):
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
        names.append(f"adapter-{number}")
        ArtefactStore(target).write(names[-1], lambda directory: peft.save_pretrained(directory) or {"kind": "adapter"})
    return names


async def run_engine(directory: Path, load: Load, storage: Path, names: Sequence[str]) -> dict[str, Figure]:
    """Measure the engine alone, with many streams, and with many streams over many adapters."""
    engine = EmbeddedEngine(
        base_models=Directory(directory),
        versions=ArtefactStore(storage),
        embedder=None,
        options=LoadingOptions(BatchLimits(max_rows=STREAMS)),
        max_model_bytes=1 << 40,
    )
    engine.start()
    mixed = [names[i % len(names)] for i in range(STREAMS)]
    warm = Load(load.prompt, 2, 1)
    await measure_engine(engine, warm, [None])
    results = {
        "one stream": await measure_engine(engine, load, [None]),
        f"{STREAMS} streams": await measure_engine(engine, load, [None] * STREAMS),
    }
    await measure_engine(engine, warm, mixed)
    results[f"{STREAMS} streams, one adapter"] = await measure_engine(engine, load, [names[0]] * STREAMS)
    results[f"{STREAMS} streams over {len(names)} adapters"] = await measure_engine(engine, load, mixed)
    await engine.stop()
    return results


def run_apart(threads: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run in a process of its own, which inherits the environment: no other side's threads or memory stand beside it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        if threads:
            processes.submit(torch.set_num_threads, threads).result()
        return processes.submit(work, *args, **kwargs).result()


def measure_ours(directory: Path, load: Load, storage: Path, names: Sequence[str]) -> tuple[dict[str, Figure], int]:
    """Give the engine's figures, and the peak memory of the process in bytes."""
    return asyncio.run(run_engine(directory, load, storage, names)), measure_peak_memory()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", help="a causal model (default: SmolLM2-135M from its package)")
    parser.add_argument("--cache", type=Path, default=Path(".data/cache"), help="where converted weights are kept")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    arguments = parser.parse_args()
    directory = arguments.directory or BaseModelSource(arguments.cache).resolve(BASE_MODEL).directory
    load = Load(make_prompt(directory, arguments.prompt_tokens), arguments.new_tokens, arguments.repeats)
    alone = run_apart(arguments.threads, measure_transformers, directory, load, 1)
    static = run_apart(arguments.threads, measure_transformers, directory, load, STREAMS)
    with tempfile.TemporaryDirectory() as storage:
        names = run_apart(arguments.threads, save_adapters, directory, Path(storage))
        os.environ |= ENGINE_ENVIRONMENT
        results, peak_bytes = run_apart(arguments.threads, measure_ours, directory, load, Path(storage), names)
    print(f"{arguments.threads or torch.get_num_threads()} threads, {preferred_dtype()}: tokens per second, per processor second, ratio")
    _print("transformers generate, alone", alone, alone)
    _print(f"transformers generate, static {STREAMS}", static, static)
    base = results[f"{STREAMS} streams"]
    for name, figure in results.items():
        _print(f"engine, {name}", figure, alone if name == "one stream" else static, base if "adapter" in name else None)
    print(f"peak memory of the engine's process {peak_bytes >> 20} MiB")


def _print(name: str, figure: Figure, peer: Figure, base: Figure | None = None) -> None:
    ratios = f"{figure.rate / peer.rate:5.2f} ({figure.processor_rate / peer.processor_rate:4.2f})"
    line = f"{name:38}{figure.rate:8.1f}{figure.processor_rate:8.1f}   {ratios}"
    if figure.first_token_seconds:
        line += f"   first token {figure.first_token_seconds:5.2f} s"
    if base is not None:
        line += f"   {figure.rate / base.rate:4.2f} ({figure.processor_rate / base.processor_rate:4.2f}) of the base's"
    print(line)


if __name__ == "__main__":
    main()
