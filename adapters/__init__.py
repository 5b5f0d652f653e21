"""The stateful layer: any chain as a `torch.optim.Optimizer`.

Any chain
  TransformOptimizer ChainOptimizer
torch's classes
  SGD Adam AdamW NAdam RAdam Adamax RMSprop Adagrad Adadelta ASGD Rprop Muon Adafactor SparseAdam LBFGS
Classes that torch lacks
  Lion LAMB
torch's classes as transformations
  from_torch_optimizer
Files
  save_safetensors load_safetensors
"""

if __name__ != "functional_optim.adapters":
    raise ImportError("import functional_optim.adapters, not adapters: a second copy of every class would be made.")

from functional_optim._addresses import publish as _publish

from . import _explained as _explained
from .adaptive import Adadelta, Adagrad, Adamax, NAdam, RAdam
from .classes import LAMB, SGD, Adam, AdamW, Lion, RMSprop
from .files import load_safetensors, save_safetensors
from .lbfgs import LBFGS
from .matrices import Adafactor, Muon
from .optimizer import ChainOptimizer
from .pure import from_torch_optimizer
from .rates import ASGD, Rprop
from .sparse import SparseAdam
from .transform import TransformOptimizer, _blank


__all__ = [
    "ASGD",
    "LAMB",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ChainOptimizer",
    "Lion",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "TransformOptimizer",
    "from_torch_optimizer",
    "load_safetensors",
    "save_safetensors",
]

_publish(__name__, [_blank, *(globals()[name] for name in __all__)])


def __dir__() -> list[str]:
    return __all__
