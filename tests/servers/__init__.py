"""Where do the real servers of the tests come from? From PATH, else out of a pinned wheel."""
