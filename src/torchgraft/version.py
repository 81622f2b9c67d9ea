"""The version of the library; ``pyproject.toml`` states the same."""

VERSION = "0.1.0"
