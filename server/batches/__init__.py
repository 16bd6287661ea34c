"""The child of a batch generation: a dataset's records through the engine to a file of answers. Loads no torch and no model."""
