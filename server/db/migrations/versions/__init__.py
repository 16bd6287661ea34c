"""One module per step, `sNNNN_what`."""
