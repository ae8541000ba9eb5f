"""The semantics of a federation: four steps, one visit to a client, the server's rounds."""
