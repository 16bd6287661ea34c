"""The vocabulary of the service: resources, states, specs, events and errors. Standard library only, no I/O."""
