"""The package's version, at the bottom, where every package can read it."""

__version__ = "0.2.0"
