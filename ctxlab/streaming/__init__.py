"""Exact contexts of data that outgrows memory."""

from .. import _face

_HOMES = {  # name -> the module that defines it
    "ContextStats": "moments",
    "Shard": "reading",
    "linear_cka": "moments",
    "load_stats": "reading",
    "local_workers": "distributed",
    "noise_floor": "null",
    "permutation_null": "null",
    "save_stats": "reading",
    "shard_stats": "reading",
    "shards": "reading",
    "stream": "reading",
    "stream_distributed": "distributed",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = _face(__name__, _HOMES)
