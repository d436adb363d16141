"""An attention context in prepared memory, and an audit of what that brings.

The names in `__all__` and the submodules are loaded when they are first used.
"""

import sys

__version__ = "0.2.0"

_HOMES = {  # name -> the module that defines it
    "Claim": "audit.trials",
    "ContextStats": "streaming.moments",
    "DerivedValue": "norm_cache",
    "DiffusionBlock": "models.diffusion",
    "LEDGER": "audit.claims",
    "LanguageModel": "models.language",
    "SSMBlock": "models.ssm",
    "SharedAttentionContext": "context",
    "TransformerBlock": "models.transformer",
    "Workspace": "workspace",
    "assert_equiv": "testing",
    "load_pairs": "data",
    "plan": "planning",
    "record": "planning",
    "traced_peak": "witness",
}
_MOVED = {  # module of version 0.1.0 -> where it is now
    "attention": "models.attention",
    "block": "models.block",
    "claims": "audit.claims",
    "compare": "audit.changes",
    "diffusion": "models.diffusion",
    "distributed": "streaming.distributed",
    "exact": "streaming.exact",
    "growth": "audit.growth",
    "ladder": "audit.ladder",
    "layers": "models.layers",
    "original": "audit.original",
    "report": "audit.report",
    "ssm": "models.ssm",
    "stack": "models.stack",
    "training": "models.training",
    "transformer": "models.transformer",
}
__all__ = ["__version__", *_HOMES]


class _Moved:
    "Answers the import of a module that has moved: a finder that is asked after all others."

    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> None:
        package, _, name = fullname.rpartition(".")
        if package == __name__ and name in _MOVED:
            raise ImportError(f"{fullname} is now {package}.{_MOVED[name]}", name=fullname)


sys.meta_path.append(_Moved)


def _submodules(package: str) -> list[str]:
    "The public modules and rooms in the folder of a package."
    from pkgutil import iter_modules

    path = sys.modules[package].__path__
    return [m.name for m in iter_modules(path) if not m.name.startswith("_")]


def _load(package: str, homes: dict[str, str], name: str) -> object:
    "A name or a submodule of a package, loaded at its first use; `homes` says where names are."
    from importlib import import_module

    if name in homes:
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)  # Python asks only for what is not there
        return value
    message = f"module {package!r} has no attribute {name!r}"
    if name.startswith("_"):  # tools ask for such names often
        raise AttributeError(message)
    modules = _submodules(package)
    if name in modules:
        return import_module(f"{package}.{name}")
    from difflib import get_close_matches

    near = get_close_matches(name, [*homes, *modules])
    raise AttributeError(f"{message}; did you mean {' or '.join(near)}?" if near else message)


def _face(package: str, homes: dict[str, str]) -> tuple[object, object]:
    "`__getattr__` and `__dir__` of a package that loads what it offers at its first use."

    def load(name: str) -> object:
        return _load(package, homes, name)

    def names() -> list[str]:
        return sorted({*homes, *_submodules(package)})

    return load, names


def __getattr__(name: str) -> object:
    if name in _MOVED:
        raise AttributeError(f"{__name__}.{name} is now {__name__}.{_MOVED[name]}")
    return _load(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_submodules(__name__)})
