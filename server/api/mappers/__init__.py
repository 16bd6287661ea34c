"""Pairs of functions between the contract's messages and the domain, one module per resource."""
