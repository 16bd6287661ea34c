"""Base models on disk: an id becomes a verified local directory, a loaded model, and the one rendering of conversations."""
