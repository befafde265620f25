"""The class of a traced network."""

from __future__ import annotations

from typing import Self

from torch import fx, nn

# Under this key fx finds attributes that a deep copy of a GraphModule keeps.
_KEPT_BY_DEEPCOPY = "_user_preserved_attributes"


class TracedModule(fx.GraphModule):
    """A GraphModule that keeps what the root's own class said about modes and state dicts.

    A graph module is no instance of the network's class. Two things of that class matter all the
    same: a `train` of its own (the usual way to keep BatchNorm frozen), and the version of its
    state dict, on which loading code branches.
    """

    _original_class: type[nn.Module] | None = None

    def remember(self, original: type[nn.Module]) -> None:
        """Keep `train` and the state-dict version of `original`, in deep copies too."""
        kept = {"_original_class": original, "_version": original._version}
        self.__dict__.update(kept)
        self.meta[_KEPT_BY_DEEPCOPY] = kept

    def train(self, mode: bool = True) -> Self:
        """Set the mode of every submodule, as the network's own `train` does it."""
        original = self._original_class
        if original is None or original.train is nn.Module.train:
            return super().train(mode)
        # The original's method, and `super()` inside it, want an instance of the original's class:
        # one that is this module in all but class.
        shadow = object.__new__(original)
        shadow.__dict__ = self.__dict__
        original.train(shadow, mode)
        return self
