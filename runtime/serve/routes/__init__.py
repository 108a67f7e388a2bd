"""The HTTP paths, a file for each kind: add(app, api)."""
