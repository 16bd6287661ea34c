"""Tests of dataset files."""
