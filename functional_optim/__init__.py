"""Composable, pure gradient transformations on PyTorch tensors; any chain runs as one generated kernel.

Steps
  apply_gradients apply_updates eval_params update_average hyperparams slots explain use_backend
  CapturedMemory
Packing
  pack unpack pack_module Packed PackedModule
Combinators
  chain named_chain masked partition multi_transform identity stateless stateless_with_tree_map
Rules
  elementwise leafwise slot zeros cbrt leaf_sum leaf_mean leaf_norm leaf_amax leaf_size tree_sum tree_norm tree_amax
Transformations
  scale scale_by_learning_rate scale_by_schedule scale_by_sign trace ema scale_by_adam scale_by_amsgrad
  scale_by_adamax scale_by_nadam scale_by_radam scale_by_rms scale_by_stddev scale_by_rss scale_by_adadelta
  scale_by_lion scale_by_rprop scale_by_asgd scale_by_belief scale_by_yogi scale_by_adan scale_by_novograd
  scale_by_optimistic_gradient scale_by_polyak scale_by_trust_ratio scale_by_param_block_norm
  scale_by_param_block_rms normalize_by_update_norm add_decayed_weights clip clip_by_global_norm clip_by_block_rms
  zero_nans set_to_zero keep_params_nonnegative params_ema params_swa scale_by_muon muon_momentum orthogonalize
  scale_by_shape scale_by_factored_rms reduce_on_plateau
Methods of second order
  scale_by_lbfgs scale_by_zoom_linesearch scale_by_backtracking_linesearch scale_by_strong_wolfe_linesearch
  value_and_grad_from_state
Optimizers
  sgd adam adamw nadam nadamw amsgrad adamax adamaxw radam rmsprop adagrad adadelta lion lars lamb sign_sgd signum
  rprop asgd adabelief yogi adan novograd optimistic_gradient_descent optimistic_adam_v2 fromage polyak_sgd muon
  adafactor lbfgs
Schedules
  constant_schedule linear_schedule polynomial_schedule exponential_decay cosine_decay_schedule inverse_sqrt_schedule
  warmup_constant_schedule warmup_cosine_decay_schedule warmup_exponential_decay_schedule warmup_stable_decay_schedule
  piecewise_constant_schedule piecewise_interpolate_schedule linear_onecycle_schedule cosine_onecycle_schedule
  interpolate_schedule cosine_annealing_schedule cosine_restarts_schedule cyclic_schedule sgdr_schedule
  cumulative_product_schedule join_schedules multiply_schedules ema_debias_schedule ema_warmup_schedule
  from_torch_scheduler schedule
Types
  GradientTransformation EmptyState MaskedNode MaskedState PartitionState Schedule Explanation RuleError

`functional_optim.adapters` makes optimizers of torch of them; import it by itself. `plot.schedules` draws schedules.
"""

from . import (
    _pickles as _pickles,
    plot as plot,
)
from ._addresses import publish as _publish
from ._chain import (
    apply_gradients,
    apply_updates,
    chain,
    identity,
    named_chain,
)
from ._compiler.errors import RuleError
from ._compiler.functions import (
    cbrt,
    leaf_amax,
    leaf_mean,
    leaf_norm,
    leaf_size,
    leaf_sum,
    tree_amax,
    tree_norm,
    tree_sum,
)
from ._compiler.slots import (
    slot,
    zeros,
)
from ._explain import (
    Explanation,
    explain,
)
from ._masking import (
    MaskedState,
    PartitionState,
    masked,
    multi_transform,
    partition,
)
from ._optimizers.adam import (
    adam,
    adamax,
    adamaxw,
    adamw,
    amsgrad,
    nadam,
    nadamw,
    radam,
)
from ._optimizers.descent import (
    asgd,
    lion,
    polyak_sgd,
    rprop,
    sgd,
    sign_sgd,
    signum,
)
from ._optimizers.layers import (
    fromage,
    lamb,
    lars,
)
from ._optimizers.matrices import (
    adafactor,
    muon,
)
from ._optimizers.moments import (
    adabelief,
    adan,
    novograd,
    yogi,
)
from ._optimizers.optimistic import (
    optimistic_adam_v2,
    optimistic_gradient_descent,
)
from ._optimizers.second_order import lbfgs
from ._optimizers.squares import (
    adadelta,
    adagrad,
    rmsprop,
)
from ._pack import (
    pack,
    unpack,
)
from ._pack_module import (
    PackedModule,
    pack_module,
)
from ._packed import Packed
from ._reading import (
    hyperparams,
    slots,
)
from ._rule import (
    elementwise,
    leafwise,
)
from ._runtime.backend import use_backend
from ._runtime.cuda.capture import CapturedMemory
from ._schedules.averaging import (
    ema_debias_schedule,
    ema_warmup_schedule,
)
from ._schedules.cosine import cosine_decay_schedule
from ._schedules.exponential import exponential_decay
from ._schedules.from_torch import from_torch_scheduler
from ._schedules.join import (
    join_schedules,
    sgdr_schedule,
)
from ._schedules.onecycle import (
    cosine_onecycle_schedule,
    linear_onecycle_schedule,
)
from ._schedules.periodic import (
    cosine_annealing_schedule,
    cosine_restarts_schedule,
    cyclic_schedule,
)
from ._schedules.piecewise import (
    interpolate_schedule,
    piecewise_constant_schedule,
    piecewise_interpolate_schedule,
)
from ._schedules.polynomial import (
    constant_schedule,
    linear_schedule,
    polynomial_schedule,
)
from ._schedules.product import (
    cumulative_product_schedule,
    multiply_schedules,
)
from ._schedules.schedule import (
    Schedule,
    schedule,
)
from ._schedules.warmup import (
    inverse_sqrt_schedule,
    warmup_constant_schedule,
    warmup_cosine_decay_schedule,
    warmup_exponential_decay_schedule,
    warmup_stable_decay_schedule,
)
from ._transform import (
    EmptyState,
    GradientTransformation,
)
from ._transforms.adadelta import scale_by_adadelta
from ._transforms.adagrad import scale_by_rss
from ._transforms.adam import (
    scale_by_adam,
    scale_by_amsgrad,
)
from ._transforms.adamax import scale_by_adamax
from ._transforms.adan import scale_by_adan
from ._transforms.asgd import scale_by_asgd
from ._transforms.averaging import (
    eval_params,
    params_ema,
    params_swa,
    update_average,
)
from ._transforms.belief import scale_by_belief
from ._transforms.clipping import (
    clip,
    clip_by_block_rms,
    clip_by_global_norm,
    zero_nans,
)
from ._transforms.constraints import keep_params_nonnegative
from ._transforms.decay import add_decayed_weights
from ._transforms.factored import scale_by_factored_rms
from ._transforms.lbfgs import scale_by_lbfgs
from ._transforms.linesearch import (
    scale_by_backtracking_linesearch,
    scale_by_strong_wolfe_linesearch,
    scale_by_zoom_linesearch,
    value_and_grad_from_state,
)
from ._transforms.momentum import (
    ema,
    trace,
)
from ._transforms.muon import (
    muon_momentum,
    orthogonalize,
    scale_by_muon,
    scale_by_shape,
)
from ._transforms.nadam import scale_by_nadam
from ._transforms.novograd import scale_by_novograd
from ._transforms.optimistic import scale_by_optimistic_gradient
from ._transforms.plateau import reduce_on_plateau
from ._transforms.polyak import scale_by_polyak
from ._transforms.radam import scale_by_radam
from ._transforms.rms import (
    scale_by_rms,
    scale_by_stddev,
)
from ._transforms.rprop import scale_by_rprop
from ._transforms.scaling import (
    normalize_by_update_norm,
    scale,
    scale_by_learning_rate,
    scale_by_param_block_norm,
    scale_by_param_block_rms,
    scale_by_schedule,
    scale_by_trust_ratio,
    set_to_zero,
)
from ._transforms.sign import (
    scale_by_lion,
    scale_by_sign,
)
from ._transforms.stateless import (
    stateless,
    stateless_with_tree_map,
)
from ._transforms.yogi import scale_by_yogi
from ._tree import MaskedNode


__version__ = "0.1.0"
__all__ = [
    "CapturedMemory",
    "EmptyState",
    "Explanation",
    "GradientTransformation",
    "MaskedNode",
    "MaskedState",
    "Packed",
    "PackedModule",
    "PartitionState",
    "RuleError",
    "Schedule",
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "adan",
    "add_decayed_weights",
    "amsgrad",
    "apply_gradients",
    "apply_updates",
    "asgd",
    "cbrt",
    "chain",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "constant_schedule",
    "cosine_annealing_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "cosine_restarts_schedule",
    "cumulative_product_schedule",
    "cyclic_schedule",
    "elementwise",
    "ema",
    "ema_debias_schedule",
    "ema_warmup_schedule",
    "eval_params",
    "explain",
    "exponential_decay",
    "from_torch_scheduler",
    "fromage",
    "hyperparams",
    "identity",
    "interpolate_schedule",
    "inverse_sqrt_schedule",
    "join_schedules",
    "keep_params_nonnegative",
    "lamb",
    "lars",
    "lbfgs",
    "leaf_amax",
    "leaf_mean",
    "leaf_norm",
    "leaf_size",
    "leaf_sum",
    "leafwise",
    "linear_onecycle_schedule",
    "linear_schedule",
    "lion",
    "masked",
    "multi_transform",
    "multiply_schedules",
    "muon",
    "muon_momentum",
    "nadam",
    "nadamw",
    "named_chain",
    "normalize_by_update_norm",
    "novograd",
    "optimistic_adam_v2",
    "optimistic_gradient_descent",
    "orthogonalize",
    "pack",
    "pack_module",
    "params_ema",
    "params_swa",
    "partition",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polyak_sgd",
    "polynomial_schedule",
    "radam",
    "reduce_on_plateau",
    "rmsprop",
    "rprop",
    "scale",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_amsgrad",
    "scale_by_asgd",
    "scale_by_backtracking_linesearch",
    "scale_by_belief",
    "scale_by_factored_rms",
    "scale_by_lbfgs",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_muon",
    "scale_by_nadam",
    "scale_by_novograd",
    "scale_by_optimistic_gradient",
    "scale_by_param_block_norm",
    "scale_by_param_block_rms",
    "scale_by_polyak",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rprop",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_shape",
    "scale_by_sign",
    "scale_by_stddev",
    "scale_by_strong_wolfe_linesearch",
    "scale_by_trust_ratio",
    "scale_by_yogi",
    "scale_by_zoom_linesearch",
    "schedule",
    "set_to_zero",
    "sgd",
    "sgdr_schedule",
    "sign_sgd",
    "signum",
    "slot",
    "slots",
    "stateless",
    "stateless_with_tree_map",
    "trace",
    "tree_amax",
    "tree_norm",
    "tree_sum",
    "unpack",
    "update_average",
    "use_backend",
    "value_and_grad_from_state",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
    "warmup_stable_decay_schedule",
    "yogi",
    "zero_nans",
    "zeros",
]

_publish(__name__, [globals()[name] for name in __all__])


def __dir__() -> list[str]:
    return [*__all__, "__version__", *({"adapters", "plot"} & globals().keys())]
