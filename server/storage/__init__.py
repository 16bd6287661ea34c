"""Artefacts under MODEL_STORAGE_PATH: written whole or not at all, sealed by hashes, verified when opened."""
