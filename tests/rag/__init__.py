"""Tests of server/rag."""
