"""onnxruntime's execution providers: asked for, and proved to have done the work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dropsurgery.errors import ArgumentError, ProviderError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# How far onnxruntime optimises a graph; the last one is its default.
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
_OPTIONS: dict[str, dict[str, str]] = {
    # TF32 keeps 10 bits of the mantissa and is on by default. cuDNN's search for the fastest
    # algorithm ends differently from run to run.
    "cuda": {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"},
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


def session_options(level: str = LEVELS[-1]) -> Any:
    """Return the options of a session that tells where its nodes run and computes alike each time.

    Its log is silent but for what is fatal: what goes wrong is raised as well.

    Args:
        level: how far onnxruntime optimises the graph, one of `LEVELS`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.use_deterministic_compute = True
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def confirm_session(provider: str, session: Any, shapes: frozenset[str]) -> str:
    """Prove what a session runs on; see `confirm`.

    Args:
        provider: "cpu" or "cuda".
        session: made with `session_options` and `session_arguments`.
        shapes: names of nodes that only compute shapes.
    """
    if not session.get_session_options().use_deterministic_compute:
        raise ProviderError("onnxruntime dropped the option for deterministic computation")
    return confirm(
        provider,
        session.get_providers(),
        session.get_provider_graph_assignment_info(),
        shapes,
        session.get_provider_options(),
    )


def confirm(
    provider: str,
    active: Sequence[str],
    assignment: Iterable[Any],
    shape_nodes: frozenset[str],
    options: Mapping[str, Mapping[str, str]],
) -> str:
    """Prove that the provider runs the graph, and return "CUDA 49/53 nodes; Shape on CPU; …".

    onnxruntime falls back to the CPU without a word: the whole session where a library is missing,
    and each node that the provider has no kernel for.

    Args:
        provider: "cpu" or "cuda".
        active: the session's own list of providers.
        assignment: `session.get_provider_graph_assignment_info()`.
        shape_nodes: names of nodes that only compute shapes. onnxruntime keeps these on the CPU on
            purpose, where shapes live.
        options: `session.get_provider_options()`: what is in force, not what was asked for.

    Raises:
        ProviderError: the provider is not active, a node that computes with data is elsewhere, or
            an option was not taken: TF32 is on.
    """
    wanted = PROVIDERS[provider]
    if wanted not in active:
        raise ProviderError(
            f"onnxruntime dropped {wanted} and would run everything on {', '.join(active)}",
            fix="check that the CUDA and cuDNN libraries of this onnxruntime are installed "
            "(onnxruntime.preload_dlls())",
        )
    placed = [(part.ep_name, node) for part in assignment for node in part.get_nodes()]
    if not placed:
        raise ProviderError("onnxruntime does not say where its nodes run")
    elsewhere = [(name, node) for name, node in placed if name != wanted]
    _refuse_fallen(
        wanted, len(placed), [node for _, node in elsewhere if node.name not in shape_nodes]
    )
    told = [f"{provider.upper()} {len(placed) - len(elsewhere)}/{len(placed)} nodes"]
    others: dict[str, set[str]] = {}
    for name, node in elsewhere:
        others.setdefault(_short(name), set()).add(node.op_type)
    told += [f"{', '.join(sorted(kinds))} on {name}" for name, kinds in others.items()]
    return "; ".join([*told, *_confirmed_options(provider, options.get(wanted, {}))])


def _refuse_fallen(wanted: str, count: int, fallen: Sequence[Any]) -> None:
    if not fallen:
        return
    shown = ", ".join(f"{node.name or '?'} ({node.op_type})" for node in fallen[:5])
    raise ProviderError(
        f"{len(fallen)} of {count} nodes fell back from {wanted}",
        where=shown + (f" and {len(fallen) - 5} more" if len(fallen) > 5 else ""),
        fix="another opset, or an onnxruntime with these kernels; "
        'provider="cpu" verifies the file without the claim',
    )


def _confirmed_options(provider: str, found: Mapping[str, str]) -> list[str]:
    """Return what the options in force prove, in words."""
    for key, value in _OPTIONS[provider].items():
        if found.get(key) != value:
            raise ProviderError(
                f"{PROVIDERS[provider]} runs with {key}={found.get(key)!r} instead of {value!r}",
                fix="an onnxruntime that takes this option; results with TF32 are not float32",
            )
    return ["TF32 off"] if provider == "cuda" else []


def _short(name: str) -> str:
    return next((short.upper() for short, long in PROVIDERS.items() if long == name), name)


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
