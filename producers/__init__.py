"""The door: the HTTP API that admits, accepts and answers for purchases."""
