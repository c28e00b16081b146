"""Ask that one: one call in, a stream of chunks out."""
