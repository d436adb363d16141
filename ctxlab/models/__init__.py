"""The three architectures, each with the context in it."""

from .. import _face

_HOMES = {  # name -> the module that defines it
    "Block": "block",
    "DiffusionBlock": "diffusion",
    "LanguageModel": "language",
    "SSMBlock": "ssm",
    "TransformerBlock": "transformer",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = _face(__name__, _HOMES)
