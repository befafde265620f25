"""`python -m dropsurgery`."""

from __future__ import annotations

from dropsurgery.cli import main

if __name__ == "__main__":
    main()
