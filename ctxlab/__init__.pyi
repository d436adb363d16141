"What `__init__.py` loads at its first use, for type checkers."

from ctxlab import audit as audit
from ctxlab import calibration as calibration
from ctxlab import cli as cli
from ctxlab import containers as containers
from ctxlab import context as context
from ctxlab import data as data
from ctxlab import files as files
from ctxlab import gemm as gemm
from ctxlab import interleave as interleave
from ctxlab import intervals as intervals
from ctxlab import measure as measure
from ctxlab import models as models
from ctxlab import norm_cache as norm_cache
from ctxlab import planning as planning
from ctxlab import pytest_plugin as pytest_plugin
from ctxlab import reference as reference
from ctxlab import streaming as streaming
from ctxlab import testing as testing
from ctxlab import versions as versions
from ctxlab import witness as witness
from ctxlab import workers as workers
from ctxlab import workspace as workspace
from ctxlab.audit.claims import LEDGER as LEDGER
from ctxlab.audit.trials import Claim as Claim
from ctxlab.context import SharedAttentionContext as SharedAttentionContext
from ctxlab.data import load_pairs as load_pairs
from ctxlab.models.diffusion import DiffusionBlock as DiffusionBlock
from ctxlab.models.language import LanguageModel as LanguageModel
from ctxlab.models.ssm import SSMBlock as SSMBlock
from ctxlab.models.transformer import TransformerBlock as TransformerBlock
from ctxlab.norm_cache import DerivedValue as DerivedValue
from ctxlab.planning import plan as plan
from ctxlab.planning import record as record
from ctxlab.streaming.moments import ContextStats as ContextStats
from ctxlab.testing import assert_equiv as assert_equiv
from ctxlab.witness import traced_peak as traced_peak
from ctxlab.workspace import Workspace as Workspace

__version__: str
