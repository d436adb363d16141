"What `__init__.py` loads at its first use, for type checkers."

from ctxlab.streaming import dependence as dependence
from ctxlab.streaming import distributed as distributed
from ctxlab.streaming import exact as exact
from ctxlab.streaming import moments as moments
from ctxlab.streaming import null as null
from ctxlab.streaming import pairs as pairs
from ctxlab.streaming import reading as reading
from ctxlab.streaming import summary as summary
from ctxlab.streaming.distributed import local_workers as local_workers
from ctxlab.streaming.distributed import stream_distributed as stream_distributed
from ctxlab.streaming.moments import ContextStats as ContextStats
from ctxlab.streaming.moments import linear_cka as linear_cka
from ctxlab.streaming.null import noise_floor as noise_floor
from ctxlab.streaming.null import permutation_null as permutation_null
from ctxlab.streaming.reading import Shard as Shard
from ctxlab.streaming.reading import load_stats as load_stats
from ctxlab.streaming.reading import save_stats as save_stats
from ctxlab.streaming.reading import shard_stats as shard_stats
from ctxlab.streaming.reading import shards as shards
from ctxlab.streaming.reading import stream as stream
