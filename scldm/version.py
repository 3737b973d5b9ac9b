"""The version of this code. pyproject.toml reads it here."""

VERSION = "0.1.0"
