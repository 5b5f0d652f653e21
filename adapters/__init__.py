"""The stateful layer: any chain as a `torch.optim.Optimizer`. It imports public names of the package only."""

if __name__ != "functional_optim.adapters":
    raise ImportError("import functional_optim.adapters, not adapters: a second copy of every class would be made.")

from .classes import (
    LAMB as LAMB,
    SGD as SGD,
    Adam as Adam,
    AdamW as AdamW,
    Lion as Lion,
    RMSprop as RMSprop,
)
from .files import (
    load_safetensors as load_safetensors,
    save_safetensors as save_safetensors,
)
from .optimizer import ChainOptimizer as ChainOptimizer
from .transform import TransformOptimizer as TransformOptimizer
