"""Turns packaged GGUF weights into a plain bfloat16 safetensors directory, once, under MODEL_CACHE_PATH.

Written aside and renamed under a file lock: processes that race get the same finished directory.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedTokenizerBase

from server.basemodels.errors import BaseModelUnavailable
from server.basemodels.loading import set_distinct_pad_token
from server.basemodels.packaged import PackagedModel
from server.diskfiles import flush, hash_file

CONVERSION_VERSION = 1  # raise it when the conversion writes something else: a cache of the old form is then left alone
SEAL_NAME = "conversion.json"
DIRECTORY_MODE = 0o755  # a cache may be shared by services under several users


def convert_packaged(packaged: PackagedModel, root: Path) -> Path:
    """Give the directory below `root` that holds the converted weights; converts at the first call (about 20 s for 135M).

    Raises BaseModelUnavailable when the packaged file is missing, or not the pinned one.
    """
    name = f"{packaged.base_model.replace('/', '--')}-{packaged.revision.removeprefix('sha256:')[:12]}-v{CONVERSION_VERSION}"
    directory = root / name
    if is_sealed(directory):
        return directory
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{name}.lock"):
        if not is_sealed(directory):
            shutil.rmtree(directory, ignore_errors=True)
            gguf = packaged.verify()
            with written_aside(directory) as aside:
                _write_converted(gguf, aside, packaged.base_model)
    return directory


def is_sealed(directory: Path) -> bool:
    """Tell whether a finished conversion lies here, its weights being those that were written."""
    try:
        seal = json.loads((directory / SEAL_NAME).read_bytes())
        return bool(seal) and all(hash_file(directory / name) == digest for name, digest in seal.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """Give an empty directory that takes `directory`'s name, flushed and sealed with its hashes, when the block ends well."""
    aside = Path(mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield aside
        seal = {path.name: hash_file(path) for path in sorted(aside.iterdir())}
        (aside / SEAL_NAME).write_text(json.dumps(seal, indent=1))
        for path in (*aside.iterdir(), aside):
            flush(path)
        aside.chmod(DIRECTORY_MODE)
        aside.rename(directory)
        flush(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_converted(gguf: Path, directory: Path, base_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if tokenizer.chat_template is None:
        raise BaseModelUnavailable(f"The packaged weights of {base_model} carry no chat template.")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    # The weights are dense now; save_pretrained refuses while the model still calls itself quantised.
    model.__dict__.update(hf_quantizer=None, is_quantized=False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    set_distinct_pad_token(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config._name_or_path = base_model
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
