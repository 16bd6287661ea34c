"""Starts every part of the service on one machine, watches over them and stops them. Knows processes, not what they do."""
