"""The gRPC edge: decode, one service call, encode. Knows the contract and the use cases; no database, no model, no rule."""
