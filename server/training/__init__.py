"""The trainer: records to tokens to batches, a flat loop, checkpoints that go on exactly, and a tried artefact. Knows no database."""
