"""`python -m benchmarks.slim [--only PATTERN]`: slim and its peers over the model zoo."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    """Run both sweeps; the whole of them writes docs/slim.md and docs/slim.json."""
    from benchmarks.slim import HERE, ours, page, peers
    from benchmarks.zoo import sweep

    parser = argparse.ArgumentParser(prog="python -m benchmarks.slim", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="a name, label or family; * and ? work")
    parser.add_argument("--side", choices=("peers", "ours"), help="run one side, write no page")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="for one model")
    parser.add_argument("--cache", type=Path, default=sweep.ROOT / "build" / "slim")
    parser.add_argument("--output", type=Path, default=sweep.ROOT / "docs", metavar="FOLDER")
    options = parser.parse_args()
    every = page.entries()
    chosen = sweep.matching(every, options.only)
    if not chosen:
        parser.error(f"no model matches {options.only!r}")
    counting = HERE / "counting.py"
    sides = {
        "peers": (peers.measure, [counting, HERE / "peers.py"]),
        "ours": (ours.measure, [counting, HERE / "ours.py", *sweep.LIBRARY]),
    }
    rows = {}
    for side, (measure, sources) in sides.items():
        if options.side not in (None, side):
            continue
        mark = sweep.digest_of(sweep.versions(page.TOOLS), sources)
        work = partial(measure, with_onnx=True)
        made = sweep.rows_of(chosen, options.cache / side, work, mark, timeout=options.timeout)
        rows[side] = {f"{row['source']}:{row['name']}": row for row in made}
    if options.side is not None:
        return
    models = page.joined(chosen, rows["peers"], rows["ours"])
    if options.only is None:
        data = {"versions": sweep.versions(page.TOOLS), "models": models}
        (options.output / "slim.json").write_text(json.dumps(data, indent=1) + "\n")
        (options.output / "slim.md").write_text(page.write(models, data["versions"]))
    print(page.short(models))


if __name__ == "__main__":
    main()
