"""Models, losses and methods for learning from noisy labels."""

__version__ = "0.1.0"
