"""The worker: claims jobs under a lease, runs each in a child process, relays its events and settles it. Never imports torch."""
