"""An attention context in prepared memory, and an audit of what that brings.

The names in `__all__` and the submodules are loaded when they are first used.
"""

__version__ = "0.1.0"

_HOMES = {  # name -> the submodule that defines it
    "ContextStats": "streaming",
    "DerivedValue": "norm_cache",
    "DiffusionBlock": "diffusion",
    "LanguageModel": "training",
    "SSMBlock": "ssm",
    "SharedAttentionContext": "context",
    "TransformerBlock": "transformer",
    "Workspace": "workspace",
    "assert_equiv": "testing",
    "load_pairs": "data",
    "traced_peak": "measure",
}
__all__ = ["__version__", *_HOMES]


def _submodules() -> list[str]:
    "The public modules in this folder."
    from pkgutil import iter_modules

    return [m.name for m in iter_modules(__path__) if not m.name.startswith("_")]


def __dir__() -> list[str]:
    return sorted({*__all__, *_submodules()})


def _load(name: str) -> object:
    "Load a name or a submodule at its first use."
    from importlib import import_module

    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value  # Python asks __getattr__ only for what is not there
        return value
    message = f"module {__name__!r} has no attribute {name!r}"
    if name.startswith("_"):  # tools ask for such names often
        raise AttributeError(message)
    modules = _submodules()
    if name in modules:
        return import_module(f"{__name__}.{name}")
    from difflib import get_close_matches

    near = get_close_matches(name, [*_HOMES, *modules])
    raise AttributeError(f"{message}; did you mean {' or '.join(near)}?" if near else message)


# A type checker reads the imports, and would believe that __getattr__ knows every name.
TYPE_CHECKING = False  # that of typing would have to be imported
if TYPE_CHECKING:
    from ctxlab import attention as attention
    from ctxlab import block as block
    from ctxlab import claims as claims
    from ctxlab import cli as cli
    from ctxlab import compare as compare
    from ctxlab import context as context
    from ctxlab import data as data
    from ctxlab import diffusion as diffusion
    from ctxlab import distributed as distributed
    from ctxlab import exact as exact
    from ctxlab import files as files
    from ctxlab import gemm as gemm
    from ctxlab import growth as growth
    from ctxlab import interleave as interleave
    from ctxlab import ladder as ladder
    from ctxlab import layers as layers
    from ctxlab import measure as measure
    from ctxlab import norm_cache as norm_cache
    from ctxlab import original as original
    from ctxlab import reference as reference
    from ctxlab import report as report
    from ctxlab import ssm as ssm
    from ctxlab import stack as stack
    from ctxlab import streaming as streaming
    from ctxlab import testing as testing
    from ctxlab import training as training
    from ctxlab import transformer as transformer
    from ctxlab import workspace as workspace
    from ctxlab.context import SharedAttentionContext as SharedAttentionContext
    from ctxlab.data import load_pairs as load_pairs
    from ctxlab.diffusion import DiffusionBlock as DiffusionBlock
    from ctxlab.measure import traced_peak as traced_peak
    from ctxlab.norm_cache import DerivedValue as DerivedValue
    from ctxlab.ssm import SSMBlock as SSMBlock
    from ctxlab.streaming import ContextStats as ContextStats
    from ctxlab.testing import assert_equiv as assert_equiv
    from ctxlab.training import LanguageModel as LanguageModel
    from ctxlab.transformer import TransformerBlock as TransformerBlock
    from ctxlab.workspace import Workspace as Workspace
else:
    __getattr__ = _load
