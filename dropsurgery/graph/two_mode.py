"""A graph module with one graph for eval and another for training, over one set of parameters."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx
from torch.fx.graph import PythonCode

from dropsurgery.errors import TraceError
from dropsurgery.graph.traced import TracedModule


class TwoModeGraphModule(TracedModule):
    """A traced network whose forward differs between `train()` and `eval()`.

    A Python `if self.training:` leaves two graphs (auxiliary heads, as in GoogLeNet and Inception).
    Both run on the same submodules and parameters; each call picks by this module's `training`.

    Attributes:
        graph: the eval graph.
        train_graph: the training graph; None where only the eval graph is left.
        train_error: why the training graph could not be had, else None. Calling the module in
            training mode then raises it.
    """

    # On the class, since fx compiles while it initialises and copies.
    train_graph: fx.Graph | None = None
    train_error: TraceError | None = None
    branching: tuple[str, ...] = ()
    _train_code = ""

    def set_training(
        self,
        train_graph: fx.Graph | None,
        error: TraceError | None = None,
        branching: tuple[str, ...] = (),
    ) -> None:
        """Set the training graph, or the reason why there is none, and recompile.

        Args:
            train_graph: the graph that runs in training mode.
            error: raised in training mode where there is no such graph.
            branching: paths of the modules whose forward asked for its mode.
        """
        self.train_graph = train_graph
        self.train_error = error
        self.branching = branching
        if train_graph is not None:
            train_graph.owning_module = self
        self.recompile()

    def recompile(self) -> PythonCode:
        """Compile both graphs; see `torch.fx.GraphModule.recompile`."""
        train_graph, error = self.train_graph, self.train_error
        if train_graph is None and error is None:
            return super().recompile()
        cls = type(self)
        if train_graph is not None:
            eval_graph, self._graph = self._graph, train_graph
            try:
                super().recompile()
                train_forward, self._train_code = cls.forward, self._code
            finally:
                self._graph = eval_graph
        result = super().recompile()
        eval_forward = cls.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.check_modes()
            if not self.training:
                return eval_forward(self, *args, **kwargs)
            if error is not None:
                raise error
            return train_forward(self, *args, **kwargs)

        cls.forward = forward
        return result

    def check_modes(self) -> None:
        """Raise where a module that branches on its mode is in another mode than the root."""
        for path in self.branching:
            if self.get_submodule(path).training != self.training:
                mode = "training" if self.training else "eval"
                raise TraceError(
                    f"the network is in {mode} mode and '{path}', whose forward depends on its "
                    "mode, is not; a traced network has one graph a mode",
                    where=path,
                    fix=f"trace with leaf_modules=['{path}'], or put both into one mode",
                )

    @property
    def code(self) -> str:
        """The Python code of both graphs, eval first."""
        eval_code = super().code
        if self.train_graph is None:
            return eval_code
        return f"# in eval\n{eval_code}\n# in training\n{self._train_code}"

    def __deepcopy__(self, memo: dict[int, Any]) -> TwoModeGraphModule:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, TwoModeGraphModule)
        train_graph = None if self.train_graph is None else copy.deepcopy(self.train_graph)
        copied.set_training(train_graph, self.train_error, self.branching)
        return copied

    def __reduce__(self) -> Any:
        raise TraceError(
            "a network with two graphs cannot be pickled",
            fix="ds.save(module, directory) writes weights and passes, and ds.load reads them",
        )
