"""Functions that a graph cannot hold as they are, as layers without state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.autograd import Function


class FollowTraining(nn.Module):
    """A function one of whose arguments is the training flag, as a module that supplies it.

    Tracing would bake the flag of the moment into the call; a module reads its own.

    Args:
        function: the function to call.
        argument: the keyword of the flag.
    """

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        super().__init__()
        self.function = function
        self.argument = argument

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the flag of this module."""
        return self.function(*args, **{**kwargs, self.argument: self.training})

    def extra_repr(self) -> str:
        """Return the function and its flag for `repr`."""
        return f"{getattr(self.function, '__name__', self.function)}, {self.argument}=self.training"


class Apply(nn.Module):
    """A `torch.autograd.Function`, whose own backward tracing through it would lose.

    Args:
        function: the class whose `apply` is called.
    """

    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the function."""
        return self.function.apply(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return the function's name for `repr`."""
        return self.function.__name__
