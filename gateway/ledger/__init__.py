"""What did every request cost, and who knows it for sure? The ledger: rows, the stores they are kept in, reports."""
