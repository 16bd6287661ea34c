"""What a newcomer runs: sample data of a made-up organization, and a client that takes it through the whole service."""
