"""Open a policy by name, to inspect or serve it: a checkpoint of a known host, or a function of yours.

Tested with NVIDIA Isaac GR00T N1.6 (transformers 4.51.3) and LeRobot 0.6.1 (transformers 5.5.4).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from lara_adapter import AdapterFormatError, HostNotInstalled, HubError, PolicySourceError
from lara_adapter.storage.files import ADAPTER_FILE, read_json
from lara_adapter.storage.hub_errors import explained

from .hosts import INSTALL, first_line, import_host
from .skeleton import skeleton

__all__ = ["Source", "attempt", "call_named", "identify", "lerobot_class", "open_policy"]

logger = logging.getLogger(__name__)

# a drive letter ("C:\\policy") is not a module
_NAMED = re.compile(r"(?P<module>.{2,}):(?P<name>[A-Za-z_][\w.]*)")

# transformers' model_type of a GR00T checkpoint -> the module that registers it
_GR00T = {
    "gr00t_n1_5": "gr00t.model.gr00t_n1",
    "Gr00tN1d6": "gr00t.model.gr00t_n1d6.gr00t_n1d6",
    "Gr00tN1d7": "gr00t.model.gr00t_n1d7.gr00t_n1d7",
}


def open_policy(source: str | os.PathLike[str], *, weights: bool = False) -> nn.Module:
    """Build the policy that `source` names.

    Args:
        source: one of
            - a folder with the `config.json` of a GR00T checkpoint (transformers' model_type Gr00tN1d6, Gr00tN1d7 or
              gr00t_n1_5) or of a LeRobot policy ("type");
            - the Hub id "user/name" of such a checkpoint;
            - "package.module:callable" or "path/to/file.py:callable": what the callable returns, called without
              arguments. The current folder can be imported from, and the file's own folder. It runs that code.
        weights: load the weights of a checkpoint. False: only `config.json` is read or downloaded, and the policy's
            parameters are on the meta device, for inspection (a host may still fetch its backbone). A callable decides
            itself.

    Returns:
        The policy, as its host builds it.

    Raises:
        PolicySourceError: there is no such folder, repository, file or callable, or the policy cannot be built.
        HostNotInstalled: the checkpoint's library cannot be imported.
    """
    text = os.fspath(source)
    identified = identify(text)
    if identified.host == "callable":
        policy = call_named(text)
        if not isinstance(policy, nn.Module):
            raise PolicySourceError(f"{text} returned {type(policy).__name__}, but an nn.Module is expected")
        return policy
    if identified.host == "gr00t":
        return _open_gr00t(text, identified.folder, identified.kind, weights)
    return _open_lerobot(text, identified.folder, weights)


class Source(NamedTuple):
    """What a source is: "callable", or a checkpoint of "gr00t" or "lerobot" with its kind and where its config is."""

    host: str
    kind: str = ""
    folder: Path = Path()


def identify(source: str) -> Source:
    """Find out what `source` names without building anything; of a repository only `config.json` is downloaded.

    Raises:
        PolicySourceError: it is neither a checkpoint of a known host nor "module:callable".
    """
    if _NAMED.fullmatch(source):
        return Source("callable")
    config_file = _find_config(source)
    try:
        config = read_json(config_file)
    except AdapterFormatError as error:
        raise PolicySourceError(f"{source}: {error}") from error
    kind = config.get("model_type")
    if kind in _GR00T:
        return Source("gr00t", str(kind), config_file.parent)
    if isinstance(config.get("type"), str):
        return Source("lerobot", config["type"], config_file.parent)
    raise PolicySourceError(
        f'{source}: its config.json has model_type={kind!r} and no "type", but a GR00T checkpoint (model_type one of '
        f'{", ".join(_GR00T)}) or a LeRobot policy ("type") is expected. For any other policy give a function that returns '
        "it: package.module:function or path/to/file.py:function"
    )


def _find_config(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            entries = sorted(entry.name for entry in folder.iterdir())[:10]
            ours = "; it is a LARA adapter: load_lara(policy, folder) opens it" if ADAPTER_FILE in entries else ""
            raise PolicySourceError(f"the folder {source} has no config.json; it has {entries}{ours}")
        return folder / "config.json"
    if folder.suffix == ".py" and folder.is_file():
        raise PolicySourceError(
            f"{source} is a file: name the function in it that returns the policy, {source}:make_policy"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise PolicySourceError(
            f"{source!r} is not a folder here; expected: a folder with config.json, a Hub id user/name, or a function, as "
            "package.module:function or path/to/file.py:function"
        )
    from huggingface_hub import hf_hub_download

    try:
        with explained(source, None, "load"):
            return Path(hf_hub_download(source, "config.json"))
    except HubError as error:
        raise PolicySourceError(f"{source!r} is not a folder here, and of the Hub: {error}") from error


def _open_gr00t(source: str, folder: Path, kind: str, weights: bool) -> nn.Module:
    import_host(_GR00T[kind], f"{source} is a {kind} checkpoint, and ")
    from transformers import AutoConfig, AutoModel

    if weights:
        return attempt(source, lambda: AutoModel.from_pretrained(source, use_safetensors=True))
    config = attempt(source, lambda: AutoConfig.from_pretrained(folder))
    # N1.5's class needs the folder that it is loaded from
    more = {"local_model_path": str(folder)} if kind == "gr00t_n1_5" else {}
    return _build(source, lambda: AutoModel.from_config(config, **more))


def lerobot_class(source: str, folder: Path) -> tuple[Any, Any]:
    """The class and the configuration of a LeRobot policy.

    Raises:
        HostNotInstalled: lerobot, or a part that this policy needs, is missing.
        PolicySourceError: LeRobot cannot read its configuration.
    """
    import_host("lerobot.policies", f"{source} is a LeRobot policy, and ")  # registers its configuration classes
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()  # as its own programs do: policies of installed plug-ins
    config = attempt(source, lambda: PreTrainedConfig.from_pretrained(folder))
    try:
        return get_policy_class(config.type), config
    except ImportError as error:
        raise HostNotInstalled(
            f"{source} is a LeRobot policy of type {config.type!r}, whose parts are not all installed "
            f"({first_line(error)}): {INSTALL['lerobot']}"
        ) from error


def _open_lerobot(source: str, folder: Path, weights: bool) -> nn.Module:
    policy_class, config = lerobot_class(source, folder)
    if weights:
        return attempt(source, lambda: policy_class.from_pretrained(source, config=config))
    config.device = "cpu"
    return _build(source, lambda: policy_class(config))


def _build(source: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Build without memory for the parameters; if that fails, with it."""
    try:
        with skeleton():
            return make()
    except (OSError, ImportError) as error:  # a file or a package is missing: with memory it would be no better
        raise _cannot_open(source, error) from error
    except Exception as error:  # a host's constructor may do anything with its parameters
        reason = f"{type(error).__name__}: {first_line(error)}"
        logger.warning(
            "%s cannot be built on the meta device (%s); building it on the CPU with random weights", source, reason
        )
    return attempt(source, make)


def attempt(source: str, make: Callable[[], Any]) -> Any:
    """Call a host's or the user's code, whose errors become a PolicySourceError with the original as its cause."""
    try:
        return make()
    except (HostNotInstalled, PolicySourceError):
        raise
    except Exception as error:
        raise _cannot_open(source, error) from error


def _cannot_open(source: str, error: Exception) -> PolicySourceError:
    return PolicySourceError(f"{source} cannot be opened: {type(error).__name__}: {first_line(error)}")


def call_named(source: str) -> Any:
    """Call what "package.module:callable" or "path/to/file.py:callable" names; an nn.Module is returned itself.

    Raises:
        PolicySourceError: there is no such callable, or it fails.
    """
    if (match := _NAMED.fullmatch(source)) is None:
        raise PolicySourceError(f"{source!r} is not of the form package.module:callable or path/to/file.py:callable")
    module, name = match["module"], match["name"]
    value: Any = attempt(source, lambda: _import_file(Path(module)) if module.endswith(".py") else _import(module))
    for part in name.split("."):
        if not hasattr(value, part):
            own = getattr(value, "__name__", None)
            there = [each for each, found in vars(value).items() if getattr(found, "__module__", None) == own]
            known = f"; it has {', '.join(there[:10])}" if there else ""
            raise PolicySourceError(f"{source}: {module} has no {name!r}{known}")
        value = getattr(value, part)
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        raise PolicySourceError(f"{source}: {name} is of type {type(value).__name__}, but a callable is expected")
    return attempt(source, value)


def _import(name: str) -> ModuleType:
    # a console script has its own folder on sys.path, not the one it is called from
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    known = sys.modules.get(path.stem)
    if known is not None:
        if Path(getattr(known, "__file__", None) or "").resolve() == path:
            return known
        raise ImportError(f"a module named {path.stem!r} is imported already, from elsewhere; rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"{path} " + ("is not a Python file" if path.exists() else "does not exist"))
    if str(path.parent) not in sys.path:
        # as with `python file.py`, but last: no neighbour shadows an installed module
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look classes up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
