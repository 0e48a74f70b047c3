"""The benchmark suite: `pytest bench --benchmark-only`, run from the repository's root."""
