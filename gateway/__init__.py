"""tierway: one OpenAI endpoint over models of several sizes."""

__version__ = "0.1.0"
