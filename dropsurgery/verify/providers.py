"""onnxruntime's execution providers: asked for, and proved to have done the work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dropsurgery.errors import ArgumentError, ProviderError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_OPTIONS: dict[str, dict[str, str]] = {
    # TF32 keeps 10 bits of the mantissa and is on by default.
    "cuda": {"use_tf32": "0"},
    "cpu": {},
}


def check(provider: str) -> None:
    """Raise where a provider is unknown, or not built into this onnxruntime."""
    if provider not in PROVIDERS:
        raise ArgumentError(
            f"provider is {provider!r}", fix=f"one of {', '.join(map(repr, PROVIDERS))}"
        )
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise ProviderError(
            f"this onnxruntime has no {PROVIDERS[provider]}",
            where=f"it has {', '.join(available)}",
            fix="install onnxruntime-gpu in place of onnxruntime, with CUDA and cuDNN",
        )


def session_arguments(provider: str) -> dict[str, Any]:
    """Return the `providers` argument of a session; the CPU stands behind every other one."""
    chosen: list[Any] = [(PROVIDERS[provider], _OPTIONS[provider])]
    if provider != "cpu":
        chosen.append(PROVIDERS["cpu"])
    return {"providers": chosen}


def confirm(
    provider: str, active: Sequence[str], assignment: Iterable[Any], shape_nodes: frozenset[str]
) -> str:
    """Prove that the provider runs the graph, and return "CUDA 49/53 nodes".

    onnxruntime falls back to the CPU without a word: the whole session where a library is missing,
    and each node that the provider has no kernel for.

    Args:
        provider: "cpu" or "cuda".
        active: the session's own list of providers.
        assignment: `session.get_provider_graph_assignment_info()`.
        shape_nodes: names of nodes that only compute shapes. onnxruntime keeps these on the CPU on
            purpose, where shapes live.

    Raises:
        ProviderError: the provider is not active, or a node that computes with data is elsewhere.
    """
    wanted = PROVIDERS[provider]
    if wanted not in active:
        raise ProviderError(
            f"onnxruntime dropped {wanted} and would run everything on {', '.join(active)}",
            fix="check that the CUDA and cuDNN libraries of this onnxruntime are installed "
            "(onnxruntime.preload_dlls())",
        )
    placed = [(part.ep_name, node) for part in assignment for node in part.get_nodes()]
    fallen = [
        f"{node.name or '?'} ({node.op_type})"
        for name, node in placed
        if name != wanted and node.name not in shape_nodes
    ]
    if not placed:
        raise ProviderError("onnxruntime does not say where its nodes run")
    if fallen:
        shown = ", ".join(fallen[:5]) + (f" and {len(fallen) - 5} more" if len(fallen) > 5 else "")
        raise ProviderError(
            f"{len(fallen)} of {len(placed)} nodes fell back from {wanted}",
            where=shown,
            fix="another opset, or an onnxruntime with these kernels; "
            'provider="cpu" verifies the file without the claim',
        )
    count = sum(name == wanted for name, _ in placed)
    return f"{provider.upper()} {count}/{len(placed)} nodes"


def shape_nodes(graph: Any) -> frozenset[str]:
    """Return the names of the nodes of an ONNX graph that compute shapes and nothing else.

    They start at `Shape` or `Size` and at constants, and no data enters on the way.
    """
    constant = {tensor.name for tensor in graph.initializer} | {""}
    shapes: set[str] = set()
    names = set()
    for node in graph.node:
        inputs = set(node.input)
        if node.op_type in ("Shape", "Size"):
            shapes.update(node.output)
            names.add(node.name)
        elif node.op_type == "Constant":
            constant.update(node.output)
        elif inputs & shapes and inputs <= shapes | constant:
            shapes.update(node.output)
            names.add(node.name)
    return frozenset(names - {""})
