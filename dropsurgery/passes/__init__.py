"""Changing a network: one file, one pass, one frozen dataclass."""
