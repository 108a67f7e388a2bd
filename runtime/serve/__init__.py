"""python -m runtime.serve: an HTTP server with a queue that survives what kills it."""
