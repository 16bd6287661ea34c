"""Retrieval's work on documents: cutting, embedding, and the index job's child side."""
