"""What training makes better: one file per objective, each a loss over micro-batches and what its mean is taken over."""
