"""How fast the runtime is, and beside what: `python -m benchmarks`, from the repository's root."""
