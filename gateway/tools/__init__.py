"""The commands beside serving: what each of them does, without the front of the command line."""
