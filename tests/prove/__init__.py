"""Does it hold at full size? Proofs that take minutes or hours: `make prove`; `make test` runs each at a small size."""
