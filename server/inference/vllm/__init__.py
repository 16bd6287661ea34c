"""Generation by vLLM on this machine: its own server, one process for each base model, spoken to as to any other server."""
