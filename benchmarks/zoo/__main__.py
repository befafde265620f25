"""`python -m benchmarks.zoo [--only PATTERN] [--structure-only]`: the sweep over the model zoo."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    """Run the sweep; the whole of it writes docs/zoo.md and docs/zoo.json."""
    from benchmarks.zoo import catalogue, page, sweep

    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="a name, label or family; * and ? work")
    parser.add_argument("--structure-only", action="store_true", help="run no network")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="for one model")
    parser.add_argument("--fresh", action="store_true", help="use no results of an earlier run")
    parser.add_argument("--cache", type=Path, default=sweep.ROOT / "build" / "zoo")
    parser.add_argument("--output", type=Path, default=sweep.ROOT / "docs", metavar="FOLDER")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE",
        help="an earlier zoo.json: run only the models whose sites, rates or option changed since",
    )  # fmt: skip
    parser.add_argument(
        "--choose", action="store_true", help="choose the smallest models of each family anew"
    )
    options = parser.parse_args()
    if options.choose:
        catalogue.choose()
    chosen = sweep.matching(catalogue.entries(), options.only)
    if not chosen:
        parser.error(f"no model matches {options.only!r}")
    cache = options.cache / ("structure" if options.structure_only else "full")
    kept = None
    if options.keep is not None and not options.structure_only:
        models = json.loads(options.keep.read_text())["models"]
        kept = {f"{row['source']}:{row['name']}": row for row in models}
    rows = sweep.run(
        chosen,
        cache,
        structure_only=options.structure_only,
        timeout=options.timeout,
        fresh=options.fresh,
        kept=kept,
    )
    whole = options.only is None and not options.structure_only
    if whole:
        options.output.mkdir(exist_ok=True)
        models = [{k: v for k, v in row.items() if k != "fingerprint"} for row in rows]
        data = {"versions": sweep.versions(), "models": models}
        (options.output / "zoo.json").write_text(json.dumps(data, indent=1) + "\n")
        (options.output / "zoo.md").write_text(page.write(rows, sweep.versions()))
    print(page.short(rows))


if __name__ == "__main__":
    main()
