"""dropsurgery."""
