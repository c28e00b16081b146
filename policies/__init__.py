"""May it? Who may ask for what, at what price. Pure: no I/O, no clock, no chance."""
