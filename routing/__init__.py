"""Where to, and is the answer good enough? Tiers, plans, cascades, confidence. Pure: no I/O, no clock, no chance."""
