"""Model names from the command line: `torchvision:NAME`, `timm:NAME`, `FILE.py:FACTORY`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import pickle
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dropsurgery.errors import ModelLoadError

# torchvision registers shape functions for these two whether or not its compiled ops are there, and
# fails where they are not. A schema is all that the registration asks for.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# An operator lives as long as the library object that declared it.
_declared: list[torch.library.Library] = []

_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Where training scripts put the state dict when they save more than that.
_WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class LoadedModel:
    """A model that a name on the command line stands for.

    Attributes:
        name: what was asked for.
        module: the network, in eval mode.
        input_shape: the shape of its one input without the batch axis, or None where the name
            does not tell.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...] | None


def load_model(
    name: str,
    *,
    weights: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Build the model that `name` stands for.

    Without `weights` the parameters are the model's own random initialisation, drawn with seed 0:
    the same name gives the same network in every process.

    Args:
        name: `torchvision:NAME`, `timm:NAME` (with or without `.TAG`) or `FILE.py:FACTORY`, where
            FACTORY is a function, a class or an `nn.Module` object in FILE.
        weights: a `.safetensors` or a state-dict file (`.pt`, `.pth`, `.bin`, `.ckpt`; read with
            `weights_only=True`, so that it runs no code), or a name that the hub has for this
            model: a torchvision weight such as `IMAGENET1K_V1`, a timm tag such as `a1_in1k`, or
            `DEFAULT`. torchvision and timm download what they do not have.
        arguments: keyword arguments for the constructor.

    Returns:
        The network in eval mode, with the shape of its input where that is known.

    Raises:
        ModelLoadError: there is no such model, it cannot be built, or the weights do not fit.
    """
    source, _, rest = name.partition(":")
    options = dict(arguments or {})
    file = weights if weights is not None and _is_file_name(weights) else None
    hub = weights if file is None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if source == "torchvision" and rest:
            module, shape = _torchvision(rest, hub, options)
        elif source == "timm" and rest:
            module, shape = _timm(rest, hub, options)
        elif re.search(r"\.py(:|$)", name):
            module, shape = _from_file(name, options), None
            if hub is not None:
                raise ModelLoadError(
                    f"'{hub}' is not a weights file, and {name} has no hub",
                    fix=f"a file that ends in {', '.join(_WEIGHT_SUFFIXES)}",
                )
        else:
            raise ModelLoadError(
                f"'{name}' does not say where the model comes from",
                fix="torchvision:NAME, timm:NAME or FILE.py:FACTORY"
                + (f"; did you mean torchvision:{name}?" if ":" not in name else ""),
            )
    if file is not None:
        load_weights(module, file)
    return LoadedModel(name, module.eval(), shape)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a state-dict file into `module`, in place and strictly.

    A state dict inside `{"state_dict": …}`, `{"model_state_dict": …}` or `{"model": …}` is found,
    and the prefix `module.` of DataParallel is taken off.

    Raises:
        ModelLoadError: the file cannot be read, holds anything but tensors, or does not fit.
    """
    state = _read_state(Path(path))
    own = module.state_dict()
    problems = [
        f"{key} is {_shape(state[key])} in the file and {_shape(own[key])} in the model"
        for key in own
        if key in state and _shape(own[key]) != _shape(state[key])
    ]
    # Checked first, because load_state_dict copies what fits before it complains.
    if not problems:
        try:
            keys = module.load_state_dict(state, strict=False)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ModelLoadError(f"the weights do not fit: {error}", where=str(path)) from error
        # safetensors stores a tied tensor once: its other names are loaded with it.
        loaded = {own[key].data_ptr() for key in own if key in state}
        missing = [key for key in keys.missing_keys if own[key].data_ptr() not in loaded]
        problems = [f"{key} is missing in the file" for key in missing]
        problems += [f"{key} is not in the model" for key in keys.unexpected_keys]
    if problems:
        raise ModelLoadError(
            f"the weights do not fit the model: {_some(problems)}",
            where=str(path),
            fix="the file that belongs to this model, or the constructor's arguments "
            "(such as num_classes) that the file was trained with",
        )


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled ops are missing, and return it.

    The package from PyPI next to a CPU build of torch has no compiled ops, and its import fails
    with "operator torchvision::nms does not exist". Only after it has failed that way are the
    missing ones of the two schemas declared and the import tried again: models work, detection ops
    raise when they are called. A torchvision that imports is never touched.

    Raises:
        ModelLoadError: torchvision is not installed, or cannot be imported for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if not re.search(r"operator torchvision::q?nms does not exist", str(error)):
            raise _broken("torchvision", error) from error
    except ImportError as error:
        raise _absent("torchvision", error) from error
    for name in [key for key in sys.modules if key.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(_SCHEMAS[name])
        _declared.append(library)
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise _broken("torchvision", error) from error


def import_timm() -> ModuleType:
    """Import timm, which needs torchvision (see `import_torchvision`), and return it.

    Raises:
        ModelLoadError: timm or torchvision is not installed or cannot be imported.
    """
    import_torchvision()
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise _absent("timm", error) from error


def _absent(package: str, error: ImportError) -> ModelLoadError:
    if error.name != package:
        return _broken(package, error)
    return ModelLoadError(
        f"{package} is not installed", fix="pip install 'dropsurgery[models]', or name a FILE.py"
    )


def _broken(package: str, error: Exception) -> ModelLoadError:
    return ModelLoadError(
        f"{package} cannot be imported: {error}",
        fix=f"install builds of torch and {package} that belong together",
    )


def _torchvision(
    name: str, weight: str | None, options: dict[str, Any]
) -> tuple[nn.Module, tuple[int, ...] | None]:
    import_torchvision()
    from torchvision import models

    names = models.list_models()
    if name not in names:
        raise _unknown("torchvision", name, names)
    builder = models.get_model_builder(name)
    chosen = None
    if weight is not None:
        entries = models.get_model_weights(name)
        wanted = weight.removeprefix(f"{entries.__name__}.")
        if wanted not in entries.__members__:
            raise _unknown_weight(f"torchvision:{name}", weight, entries.__members__)
        chosen = entries[wanted]
    options = {**options, "weights": chosen}
    if chosen is None and "weights_backbone" in inspect.signature(builder).parameters:
        # Detection and segmentation models would download their backbone's weights unasked.
        options.setdefault("weights_backbone", None)
    module = _build(f"torchvision:{name}", builder, options, weight)
    return module, _torchvision_shape(name, builder.__module__, module)


def _torchvision_shape(name: str, home: str, module: nn.Module) -> tuple[int, ...] | None:
    if ".detection" in home or ".optical_flow" in home:  # lists of images, pairs of frames
        return None
    if ".video" in home:
        side = 112 if home.endswith("resnet") else 224
        return (3, 16, side, side)
    side = 299 if "inception" in name else 224
    side = getattr(module, "image_size", side)  # vision transformers take one size only
    return (3, side, side)


def _timm(
    name: str, tag: str | None, options: dict[str, Any]
) -> tuple[nn.Module, tuple[int, ...] | None]:
    timm = import_timm()
    arch, _, name_tag = name.partition(".")
    if not timm.is_model(arch):
        raise _unknown("timm", arch, timm.list_models())
    known = [key.partition(".")[2] for key in timm.list_pretrained(f"{arch}.*")]
    for given in filter(None, (name_tag, "" if tag == "DEFAULT" else tag)):
        if given not in known:
            raise _unknown_weight(f"timm:{arch}", given, known)
    full = f"{arch}.{tag}" if tag not in (None, "DEFAULT") else name
    module = _build(
        f"timm:{name}",
        lambda **given: timm.create_model(full, **given),
        {**options, "pretrained": tag is not None},
        tag,
    )
    config: Any = module.pretrained_cfg
    channels, height, width = config["input_size"]
    size = options.get("img_size", (height, width))
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return module, (options.get("in_chans", channels), height, width)


def _build(
    name: str, builder: Callable[..., object], options: dict[str, Any], weight: str | None
) -> nn.Module:
    try:
        # torchvision announces future initialisations of models that are about to be overwritten.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            module = builder(**options)
    except (Exception, SystemExit) as error:
        if weight is not None and isinstance(error, OSError):
            raise ModelLoadError(
                f"the weights {weight} of {name} could not be fetched: {_one_line(error)}",
                fix="a machine with a network, or a local file: --weights FILE.safetensors",
            ) from error
        raise ModelLoadError(f"{name} cannot be built: {_one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelLoadError(
            f"{name} gave {type(module).__name__}, not a torch.nn.Module",
            fix="a factory that returns the network",
        )
    return module


def _from_file(name: str, options: dict[str, Any]) -> nn.Module:
    text, _, factory = name.rpartition(":")
    if not text.endswith(".py") or not factory:
        raise ModelLoadError(f"'{name}' names no factory", fix=f"{name.rstrip(':')}:FACTORY")
    path = Path(text).resolve()
    if not path.is_file():
        raise ModelLoadError(f"there is no file {text}", where=name)
    with _importable(path.parent):
        scope = vars(_run_file(path, name))
        if factory not in scope:
            callables = [key for key, value in scope.items() if callable(value)]
            raise ModelLoadError(f"{text} has no '{factory}'{_near(factory, callables)}")
        made = scope[factory]
        if isinstance(made, nn.Module) and not options:
            return made
        if not callable(made):
            raise ModelLoadError(
                f"{name} is {type(made).__name__}, which cannot be called",
                fix="a function or class that returns the network",
            )
        return _build(name, made, options, None)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a file import its neighbours, as `python FILE.py` would."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _run_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"dropsurgery_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ModelLoadError(f"{path} cannot be imported", where=name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if Path(f.filename) == path), None)
        line = error.lineno if isinstance(error, SyntaxError) else line
        place = f"{path}, line {line}" if line else str(path)
        raise ModelLoadError(f"the file fails: {_one_line(error)}", where=place) from error
    return module


def _is_file_name(weights: str) -> bool:
    return weights.endswith(_WEIGHT_SUFFIXES) or Path(weights).is_file()


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    if not path.is_file():
        raise ModelLoadError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            "the file holds more than tensors, and reading it could run code",
            where=str(path),
            fix="torch.save(model.state_dict(), path), or safetensors.torch.save_model",
        ) from error
    except Exception as error:
        raise ModelLoadError(
            f"the weights cannot be read: {_one_line(error)}", where=str(path)
        ) from error
    if isinstance(state, Mapping):
        inner = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None)
        state = inner if inner is not None else state
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(value, torch.Tensor) for value in state.values())
    ):
        raise ModelLoadError(
            "the file holds no state dict (names and tensors)",
            where=str(path),
            fix="torch.save(model.state_dict(), path)",
        )
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _shape(value: object) -> tuple[int, ...] | None:
    """The shape of a tensor; None where it has none yet (lazy parameters)."""
    if not isinstance(value, torch.Tensor) or nn.parameter.is_lazy(value):
        return None
    return tuple(value.shape)


def _some(items: list[str], most: int = 4) -> str:
    rest = len(items) - most
    return "; ".join(items[:most]) + (f"; and {rest} more" if rest > 0 else "")


def _unknown(source: str, name: str, names: Iterable[str]) -> ModelLoadError:
    return ModelLoadError(
        f"{source} has no model '{name}'{_near(name, names)}",
        fix=f"a name from {source}.{'models.' * (source == 'torchvision')}list_models()",
    )


def _unknown_weight(model: str, weight: str, names: Iterable[str]) -> ModelLoadError:
    have = ", ".join(sorted(names)) or "none"
    return ModelLoadError(
        f"{model} has no weights '{weight}', and there is no such file", fix=f"it has: {have}"
    )


def _near(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=4, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
