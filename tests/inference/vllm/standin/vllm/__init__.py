"""Answers to this name where no vLLM is installed: starts, listens and ends like its server, and computes nothing."""
