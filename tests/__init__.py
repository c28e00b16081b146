"""Is tierway what it says? The tree mirrors the source; real servers come from `tests/servers`."""
