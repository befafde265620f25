"""How slim networks get, here and by the tools that others use: `python -m benchmarks.slim`.

`peers` and `ours` make a row of one model each, in a process of its own; `page` writes docs/slim.md
from the rows of both, which are kept apart, so that a change of the library makes only its own rows
anew.
"""

from pathlib import Path

HERE = Path(__file__).parent
