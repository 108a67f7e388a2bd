"""A request under a profiler, and what the profile says: `python -m tools.profile`, from the repository's root."""
