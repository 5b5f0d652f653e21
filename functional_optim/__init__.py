"""Composable, pure gradient transformations on PyTorch tensors; any chain runs as one generated kernel."""

from ._chain import (
    apply_gradients as apply_gradients,
    apply_updates as apply_updates,
    chain as chain,
    identity as identity,
    named_chain as named_chain,
)
from ._compiler.functions import (
    cbrt as cbrt,
    leaf_amax as leaf_amax,
    leaf_mean as leaf_mean,
    leaf_norm as leaf_norm,
    leaf_sum as leaf_sum,
    tree_amax as tree_amax,
    tree_norm as tree_norm,
    tree_sum as tree_sum,
)
from ._compiler.rule import (
    slot as slot,
    zeros as zeros,
)
from ._compiler.trace import RuleError as RuleError
from ._explain import (
    Explanation as Explanation,
    explain as explain,
)
from ._masking import (
    MaskedState as MaskedState,
    PartitionState as PartitionState,
    masked as masked,
    multi_transform as multi_transform,
    partition as partition,
)
from ._optimizers import (
    adam as adam,
    adamw as adamw,
    amsgrad as amsgrad,
    lamb as lamb,
    lars as lars,
    lion as lion,
    nadam as nadam,
    nadamw as nadamw,
    rmsprop as rmsprop,
    sgd as sgd,
    sign_sgd as sign_sgd,
    signum as signum,
)
from ._rule import elementwise as elementwise
from ._runtime.backend import use_backend as use_backend
from ._schedules.cosine import cosine_decay_schedule as cosine_decay_schedule
from ._schedules.exponential import exponential_decay as exponential_decay
from ._schedules.join import (
    join_schedules as join_schedules,
    sgdr_schedule as sgdr_schedule,
)
from ._schedules.onecycle import (
    cosine_onecycle_schedule as cosine_onecycle_schedule,
    linear_onecycle_schedule as linear_onecycle_schedule,
)
from ._schedules.piecewise import (
    piecewise_constant_schedule as piecewise_constant_schedule,
    piecewise_interpolate_schedule as piecewise_interpolate_schedule,
)
from ._schedules.polynomial import (
    constant_schedule as constant_schedule,
    linear_schedule as linear_schedule,
    polynomial_schedule as polynomial_schedule,
)
from ._schedules.schedule import (
    Schedule as Schedule,
    schedule as schedule,
)
from ._schedules.warmup import (
    inverse_sqrt_schedule as inverse_sqrt_schedule,
    warmup_constant_schedule as warmup_constant_schedule,
    warmup_cosine_decay_schedule as warmup_cosine_decay_schedule,
    warmup_exponential_decay_schedule as warmup_exponential_decay_schedule,
    warmup_stable_decay_schedule as warmup_stable_decay_schedule,
)
from ._transform import (
    EmptyState as EmptyState,
    GradientTransformation as GradientTransformation,
)
from ._transforms.adam import (
    scale_by_adam as scale_by_adam,
    scale_by_amsgrad as scale_by_amsgrad,
)
from ._transforms.averaging import (
    eval_params as eval_params,
    params_ema as params_ema,
)
from ._transforms.clipping import (
    clip as clip,
    clip_by_block_rms as clip_by_block_rms,
    clip_by_global_norm as clip_by_global_norm,
    zero_nans as zero_nans,
)
from ._transforms.decay import add_decayed_weights as add_decayed_weights
from ._transforms.momentum import (
    ema as ema,
    trace as trace,
)
from ._transforms.rms import (
    scale_by_rms as scale_by_rms,
    scale_by_stddev as scale_by_stddev,
)
from ._transforms.scaling import (
    scale as scale,
    scale_by_learning_rate as scale_by_learning_rate,
    scale_by_schedule as scale_by_schedule,
    scale_by_trust_ratio as scale_by_trust_ratio,
    set_to_zero as set_to_zero,
)
from ._transforms.sign import (
    scale_by_lion as scale_by_lion,
    scale_by_sign as scale_by_sign,
)
from ._transforms.stateless import (
    stateless as stateless,
    stateless_with_tree_map as stateless_with_tree_map,
)
from ._tree import MaskedNode as MaskedNode


__version__ = "0.1.0"
