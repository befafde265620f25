"""The open axes of a file: sizes that the reference accepts, and a sweep over each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from dropsurgery.errors import VerifyError
from dropsurgery.verify.cases import Spec, other_symbols

# Tried in this order; images first where an input looks like one.
_LENGTHS = (16, 8, 32, 64, 7, 128)
_SIDES = (64, 32, 224, 128, 96, 256, 299)
_MOST = 40  # combinations that are tried

Accepts = Callable[[Mapping[str, int]], bool]


def first_sizes(specs: Sequence[Spec], accepts: Accepts, where: str) -> dict[str, int]:
    """Return a size for each open axis beside the batch, the same for all where that will do.

    Args:
        specs: the inputs.
        accepts: says whether the reference runs with sizes.
        where: names the reference, for the message.

    Raises:
        VerifyError: the reference accepts none of the usual sizes.
    """
    names = other_symbols(specs)
    if not names:
        return {}
    usual = _SIDES if any(_is_image(spec) for spec in specs) else _LENGTHS
    equal = [(size,) * len(names) for size in usual]
    mixed = itertools.product(usual, repeat=len(names))
    tried = itertools.islice(dict.fromkeys(itertools.chain(equal, mixed)), _MOST)
    for choice in tried:
        sizes = dict(zip(names, choice, strict=True))
        if accepts(sizes):
            return sizes
    raise VerifyError(
        f"no size was found for the open axes {', '.join(names)}",
        where=f"{where}, tried {', '.join(map(str, usual))}",
        fix="pass inputs=, a tensor or a tuple of forward's arguments",
    )


def swept_sizes(name: str, sizes: Mapping[str, int], accepts: Accepts) -> Iterator[dict[str, int]]:
    """Yield other sizes of one axis that the reference accepts: another one, and one.

    A graph that was captured with a size baked in shows it with any other one; exporters take a
    size of one for a constant.
    """
    base = sizes[name]
    for size in (base + 1, base + 32, 2 * base, base // 2, base + 16, base + 8):
        other = {**sizes, name: size}
        if size > 1 and size != base and accepts(other):
            yield other
            break
    single = {**sizes, name: 1}
    if base != 1 and accepts(single):
        yield single


def _is_image(spec: Spec) -> bool:
    return (
        spec.dtype.is_floating_point
        and len(spec.shape) >= 4
        and any(isinstance(size, str) for size in spec.shape[2:])
    )
