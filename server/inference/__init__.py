"""The embedded engine (torch), the server of its process, and the client that the API uses. `client` and `wire` import no torch."""
