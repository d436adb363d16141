"What `__init__.py` loads at its first use, for type checkers."

from ctxlab.models import attention as attention
from ctxlab.models import block as block
from ctxlab.models import diffusion as diffusion
from ctxlab.models import language as language
from ctxlab.models import layers as layers
from ctxlab.models import optimiser as optimiser
from ctxlab.models import ssm as ssm
from ctxlab.models import stack as stack
from ctxlab.models import training as training
from ctxlab.models import transformer as transformer
from ctxlab.models.block import Block as Block
from ctxlab.models.diffusion import DiffusionBlock as DiffusionBlock
from ctxlab.models.language import LanguageModel as LanguageModel
from ctxlab.models.ssm import SSMBlock as SSMBlock
from ctxlab.models.transformer import TransformerBlock as TransformerBlock
