"""The table of transformations: a row for each, beside optax."""

import math
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import torch

import functional_optim as fo
from _lib.records import double


class Case(NamedTuple):
    """A transformation and its counterpart.

    Args:
      id: its name, and what is special about this row.
      ours: the transformation.
      theirs: optax's.
      gradients: which ones; see `_lib.records.gradients`.
    """

    id: str
    ours: Any
    theirs: Any
    gradients: str = "normal"


class ParamsEmaState(NamedTuple):
    ema: Any


def params_ema(decay: float) -> optax.GradientTransformation:
    """The average of updated parameters, which optax has no transformation for, written out."""

    def update(updates: Any, state: ParamsEmaState, params: Any) -> tuple[Any, ParamsEmaState]:
        ema = jax.tree.map(lambda e, p, u: decay * e + (1 - decay) * (p + u), state.ema, params, updates)
        return updates, ParamsEmaState(ema)

    return optax.GradientTransformation(ParamsEmaState, update)


class MuonMomentumState(NamedTuple):
    count: Any
    mu: Any


def muon_momentum(beta: float) -> optax.GradientTransformation:
    """The momentum of optax's Muon, which is a part of its transformation, written out."""

    def init(params: Any) -> MuonMomentumState:
        return MuonMomentumState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: MuonMomentumState, params: Any) -> tuple[Any, MuonMomentumState]:
        t = state.count + 1
        mu = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.mu, updates)
        later, now = 1 - beta ** (t + 1.0), 1 - beta ** (t + 0.0)
        new = jax.tree.map(lambda m, g: beta * m / later + (1 - beta) * g / now, mu, updates)
        return new, MuonMomentumState(t, mu)

    return optax.GradientTransformation(init, update)


class CountState(NamedTuple):
    count: Any


class NadamState(NamedTuple):
    count: Any
    mu_product: Any
    mu: Any
    nu: Any


def asgd(rate: float, lambd: float, alpha: float) -> optax.GradientTransformation:
    """A step of torch's ASGD, written out."""

    def update(updates: Any, state: CountState, params: Any) -> tuple[Any, CountState]:
        eta = rate / (1 + lambd * rate * float(state.count)) ** alpha
        return jax.tree.map(lambda g, p: p * (1 - lambd * eta) - eta * g - p, updates, params), CountState(
            state.count + 1
        )

    return optax.GradientTransformation(lambda params: CountState(jnp.int32(0)), update)


def nadam(b1: float, b2: float, eps: float, eps_root: float, decay: float) -> optax.GradientTransformation:
    """NAdam with a schedule of the momentum, which optax has no transformation for, written out."""

    def momentum(t: int) -> float:
        return float(b1 * (1 - 0.96 ** (t * decay) / 2))

    def init(params: Any) -> NadamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return NadamState(jnp.int32(0), jax.tree.map(lambda p: jnp.float64(1.0), params), zeros, zeros)

    def update(updates: Any, state: NadamState, params: Any) -> tuple[Any, NadamState]:
        t = int(state.count) + 1
        product = math.prod(momentum(k) for k in range(1, t + 1))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, updates)
        ahead = jax.tree.map(
            lambda m, g: momentum(t + 1) * m / (1 - product * momentum(t + 1)) + (1 - momentum(t)) * g / (1 - product),
            mu,
            updates,
        )
        new = jax.tree.map(lambda a, v: a / (jnp.sqrt(v / (1 - b2**t) + eps_root) + eps), ahead, nu)
        return new, NadamState(jnp.int32(t), jax.tree.map(lambda p: jnp.float64(product), updates), mu, nu)

    return optax.GradientTransformation(init, update)


class AdanState(NamedTuple):
    count: Any
    m: Any
    v: Any
    n: Any
    g: Any


def adan(b1: float, b2: float, b3: float, eps: float, eps_root: float) -> optax.GradientTransformation:
    """Adan with the factor of differences of the paper, which is 1 minus it in optax, written out."""

    def init(params: Any) -> AdanState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdanState(jnp.int32(0), zeros, zeros, zeros, zeros)

    def update(updates: Any, state: AdanState, params: Any) -> tuple[Any, AdanState]:
        t = int(state.count) + 1
        d = jax.tree.map(lambda g, last: g - last if t > 1 else 0 * g, updates, state.g)
        m = jax.tree.map(lambda x, g: b1 * x + (1 - b1) * g, state.m, updates)
        v = jax.tree.map(lambda x, y: b2 * x + (1 - b2) * y, state.v, d)
        n = jax.tree.map(lambda x, g, y: b3 * x + (1 - b3) * (g + b2 * y) ** 2, state.n, updates, d)
        new = jax.tree.map(
            lambda x, y, z: (x / (1 - b1**t) + b2 * y / (1 - b2**t)) / (jnp.sqrt(z / (1 - b3**t) + eps_root) + eps),
            m,
            v,
            n,
        )
        return new, AdanState(jnp.int32(t), m, v, n, updates)

    return optax.GradientTransformation(init, update)


class ParamsSwaState(NamedTuple):
    count: Any
    swa: Any
    n_averaged: Any


def params_swa(start: int, period: int) -> optax.GradientTransformation:
    """The mean of updated parameters after steps `start`, `start + period`, ..., written out as a sum."""

    def init(params: Any) -> ParamsSwaState:
        return ParamsSwaState(jnp.zeros((), int), params, jax.tree.map(lambda p: jnp.zeros(()), params))

    def update(updates: Any, state: ParamsSwaState, params: Any) -> tuple[Any, ParamsSwaState]:
        t = int(state.count) + 1
        n = len([s for s in range(start, t) if (s - start) % period == 0])  # averaged before this step
        is_due = t >= start and (t - start) % period == 0
        after = jax.tree.map(lambda p, u: p + u, params, updates)
        if n and is_due:
            after = jax.tree.map(lambda mean, x: (n * mean + x) / (n + 1), state.swa, after)
        counts = jax.tree.map(lambda p: jnp.float64(n + is_due), params)
        return updates, ParamsSwaState(state.count + 1, state.swa if n and not is_due else after, counts)

    return optax.GradientTransformation(init, update)


def rprop(*args: float) -> optax.GradientTransformation:
    """optax's Rprop without its delay: it keeps the update of a step for the next one, and returns the one before."""
    delayed = optax.scale_by_rprop(*args)

    def update(updates: Any, state: Any, params: Any) -> Any:
        _, state = delayed.update(updates, state, params)
        return state.prev_updates, state

    return optax.GradientTransformation(delayed.init, update)


class Renamed:
    """A state of optax under the names that its fields have here.

    Args:
      inner: the state.
      names: optax's name of each field, by ours.
    """

    def __init__(self, inner: Any, names: dict[str, str]) -> None:
        self.inner, self.names = inner, names

    def _asdict(self) -> dict[str, Any]:
        return {ours: getattr(self.inner, theirs) for ours, theirs in self.names.items()}


def renamed(tx: optax.GradientTransformation, **names: str) -> optax.GradientTransformation:
    """A transformation of optax whose state has the fields that ours has; `names` are optax's, by ours."""

    def update(updates: Any, state: Renamed, params: Any) -> tuple[Any, Renamed]:
        updates, inner = tx.update(updates, state.inner, params)
        return updates, Renamed(inner, names)

    return optax.GradientTransformation(lambda params: Renamed(tx.init(params), names), update)


MASK = {"layers": [True, (False,)], "scale": False}
SWITCHES = (True, False)

CASES = [
    Case("scale", fo.scale(-0.3), optax.scale(-0.3)),
    Case("scale_by_learning_rate", fo.scale_by_learning_rate(0.3), optax.scale_by_learning_rate(0.3)),
    Case(
        "scale_by_learning_rate-ascent",
        fo.scale_by_learning_rate(0.3, flip_sign=False),
        optax.scale_by_learning_rate(0.3, flip_sign=False),
    ),
    Case(
        "scale_by_learning_rate-schedule",
        fo.scale_by_learning_rate(fo.linear_schedule(1.0, 0.1, 20)),
        optax.scale_by_learning_rate(double(optax.linear_schedule(1.0, 0.1, 20))),
    ),
    # optax returns the identity here, which makes descent ascent; this package negates
    Case("scale_by_learning_rate-none", fo.scale_by_learning_rate(None), optax.scale(-1.0)),
    Case("scale_by_learning_rate-none_ascent", fo.scale_by_learning_rate(None, flip_sign=False), optax.identity()),
    Case(
        "scale_by_schedule",
        fo.scale_by_schedule(fo.exponential_decay(1.0, 7, 0.5)),
        optax.scale_by_schedule(double(optax.exponential_decay(1.0, 7, 0.5))),
    ),
    Case(
        "scale_by_schedule-function",
        fo.scale_by_schedule(lambda count: 1 / (1 + count)),
        optax.scale_by_schedule(double(lambda count: 1 / (1 + count))),
    ),
    Case("scale_by_sign", fo.scale_by_sign(), optax.scale_by_sign(), "with_zeros"),
    Case("set_to_zero", fo.set_to_zero(), optax.set_to_zero()),
    *(Case(f"trace-nesterov={n}", fo.trace(0.9, nesterov=n), optax.trace(0.9, nesterov=n)) for n in SWITCHES),
    # a narrow accumulator times a number of strong float64 is a float64, as here: one rounding, when it is stored
    Case(
        "trace-float32",
        fo.trace(0.9, accumulator_dtype=torch.float32),
        optax.trace(jnp.float64(0.9), accumulator_dtype=jnp.float32),
    ),
    *(Case(f"ema-debias={d}", fo.ema(0.9, debias=d), optax.ema(0.9, debias=d)) for d in SWITCHES),
    Case(
        "ema-float32",
        fo.ema(0.9, accumulator_dtype=torch.float32),
        optax.ema(jnp.float64(0.9), accumulator_dtype=jnp.float32),
    ),
    *(
        Case(
            f"scale_by_adam-nesterov={n}-eps_root={e}",
            fo.scale_by_adam(eps_root=e, nesterov=n),
            optax.scale_by_adam(eps_root=e, nesterov=n),
        )
        for n, e in product(SWITCHES, (0.0, 1e-3))
    ),
    Case("scale_by_adam-decays", fo.scale_by_adam(0.5, 0.75, eps=1e-2), optax.scale_by_adam(0.5, 0.75, eps=1e-2)),
    Case("scale_by_adam-no_momentum", fo.scale_by_adam(b1=0.0), optax.scale_by_adam(b1=0.0)),
    Case(
        "scale_by_adam-mu_dtype",
        fo.scale_by_adam(mu_dtype=torch.float32),
        optax.scale_by_adam(jnp.float64(0.9), mu_dtype=jnp.float32),
    ),
    *(
        Case(
            f"scale_by_amsgrad-mu={m}-nu={n}",
            fo.scale_by_amsgrad(b2=0.5, eps_root=e, bias_correction_mu=m, bias_correction_nu=n),
            optax.scale_by_amsgrad(b2=0.5, eps_root=e, bias_correction_mu=m, bias_correction_nu=n),
        )
        for (m, n), e in zip(product(SWITCHES, SWITCHES), (0.0, 1e-3, 0.0, 1e-3), strict=True)
    ),
    *(
        Case(
            f"scale_by_rms-eps_in_sqrt={e}-bias_correction={b}-initial_scale={s}",
            fo.scale_by_rms(eps_in_sqrt=e, bias_correction=b, initial_scale=s),
            optax.scale_by_rms(eps_in_sqrt=e, bias_correction=b, initial_scale=s),
        )
        for e, b, s in product(SWITCHES, SWITCHES, (0.0, 0.5))
    ),
    # A variance is a difference: with nu / v as the factor by which rounding errors grow, v must not be much smaller
    # than nu. Uncorrected means of weight W = 1 - decay**t have v >= (1 - W) nu, a factor of 14 at the last step.
    # Corrected means weigh 1, so v is 0 at the first step and whatever rounding leaves: decay 1/2 and gradients of
    # few bits make that step exact. From then on the last two gradients have opposite signs and weigh at least 1/3
    # and 1/2, so v >= (1/3)(2/3)(1/2 + 1/2)**2 of nu <= 4, a factor of 18.
    *(
        Case(
            f"scale_by_stddev-eps_in_sqrt={e}-bias_correction={b}-initial_scale={s}",
            fo.scale_by_stddev(0.5 if b else 0.9, eps_in_sqrt=e, bias_correction=b, initial_scale=s),
            optax.scale_by_stddev(0.5 if b else 0.9, eps_in_sqrt=e, bias_correction=b, initial_scale=s),
            "alternating" if b else "normal",
        )
        for e, b, s in product(SWITCHES, SWITCHES, (0.0, 0.5))
    ),
    *(
        Case(
            f"scale_by_lion-{m}",
            fo.scale_by_lion(mode=m, smooth_beta=2.0),
            optax.scale_by_lion(mode=m, smooth_beta=2.0),
        )
        for m in ("hard", "smooth", "refined")
    ),
    Case("scale_by_adamax", fo.scale_by_adamax(), optax.scale_by_adamax(), "with_zeros"),
    # the length of the second moment is a difference, of 1999 and nearly as much for b2 = 0.999, and of 19 for 0.9
    *(
        Case(
            f"scale_by_radam-nesterov={n}-threshold={t}",
            fo.scale_by_radam(b2=0.9, eps_root=e, threshold=t, nesterov=n),
            optax.scale_by_radam(b2=0.9, eps_root=e, threshold=t, nesterov=n),
        )
        for n, t, e in ((False, 5.0, 0.0), (True, 11.5, 1e-3))
    ),
    # a second moment that is never of as many as 4 updates
    Case("scale_by_radam-momentum", fo.scale_by_radam(0.5, 0.6), optax.scale_by_radam(0.5, 0.6)),
    Case("scale_by_nadam", fo.scale_by_nadam(), nadam(0.9, 0.999, 1e-8, 0.0, 4e-3)),
    Case("scale_by_rss", fo.scale_by_rss(0.0), optax.scale_by_rss(0.0), "with_zeros"),
    Case("scale_by_adadelta", fo.scale_by_adadelta(), optax.scale_by_adadelta(), "with_zeros"),
    Case("scale_by_rprop", fo.scale_by_rprop(0.1), rprop(0.1), "with_zeros"),
    Case("scale_by_asgd", fo.scale_by_asgd(0.1, 0.5, 0.6), asgd(0.1, 0.5, 0.6)),
    *(
        Case(
            f"scale_by_belief-nesterov={n}",
            fo.scale_by_belief(0.5, 0.75, e, r, nesterov=n),
            optax.scale_by_belief(0.5, 0.75, e, r, nesterov=n),
        )
        for n, e, r in ((False, 1e-3, 1e-4), (True, 1e-2, 0.0))
    ),
    Case("scale_by_belief-defaults", fo.scale_by_belief(), optax.scale_by_belief()),
    Case("scale_by_yogi", fo.scale_by_yogi(), optax.scale_by_yogi(), "with_zeros"),
    Case(
        "scale_by_yogi-arguments",
        fo.scale_by_yogi(0.5, 0.75, 1e-2, 1e-3, 0.1),
        optax.scale_by_yogi(0.5, 0.75, 1e-2, 1e-3, 0.1),
    ),
    Case("scale_by_adan", fo.scale_by_adan(), adan(0.98, 0.92, 0.99, 1e-8, 0.0)),
    Case("scale_by_adan-arguments", fo.scale_by_adan(0.5, 0.6, 0.7, 1e-2, 1e-3), adan(0.5, 0.6, 0.7, 1e-2, 1e-3)),
    # optax has 1 - b2 in the place of b2
    Case(
        "scale_by_adan-half",
        fo.scale_by_adan(0.9, 0.5, 0.75),
        renamed(optax.scale_by_adan(0.9, 0.5, 0.75), count="t", m="m", v="v", n="n", g="g"),
    ),
    Case("scale_by_novograd", fo.scale_by_novograd(), optax.scale_by_novograd()),
    Case(
        "scale_by_novograd-arguments",
        fo.scale_by_novograd(0.5, 0.75, 1e-2, 1e-3, 0.1),
        optax.scale_by_novograd(0.5, 0.75, 1e-2, 1e-3, 0.1),
        "with_zeros",
    ),
    Case(
        "scale_by_optimistic_gradient",
        fo.scale_by_optimistic_gradient(0.7, 0.3),
        renamed(optax.scale_by_optimistic_gradient(0.7, 0.3), previous_gradient="previous_gradient"),
    ),
    Case("scale_by_lion-decays", fo.scale_by_lion(0.5, 0.75), optax.scale_by_lion(0.5, 0.75)),
    Case(
        "scale_by_lion-mu_dtype",
        fo.scale_by_lion(mu_dtype=torch.float32),
        optax.scale_by_lion(jnp.float64(0.9), jnp.float64(0.99), mu_dtype=jnp.float32),
    ),
    Case("scale_by_trust_ratio", fo.scale_by_trust_ratio(), optax.scale_by_trust_ratio(), "with_zeros"),
    # norms of the three leaves are near 19, 2 and 1, so that the floor lifts some and not others
    Case(
        "scale_by_trust_ratio-min_norm",
        fo.scale_by_trust_ratio(2.0, 0.1, 1e-2),
        optax.scale_by_trust_ratio(2.0, 0.1, 1e-2),
        "with_zeros",
    ),
    Case("add_decayed_weights", fo.add_decayed_weights(0.1), optax.add_decayed_weights(0.1)),
    Case("add_decayed_weights-mask", fo.add_decayed_weights(0.1, MASK), optax.add_decayed_weights(0.1, MASK)),
    Case(
        "add_decayed_weights-mask_prefix",
        fo.add_decayed_weights(0.1, {"layers": True, "scale": False}),
        optax.add_decayed_weights(0.1, {"layers": True, "scale": False}),
    ),
    Case(
        "add_decayed_weights-mask_function",
        fo.add_decayed_weights(0.1, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.add_decayed_weights(0.1, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    ),
    Case(
        "add_decayed_weights-schedule",
        fo.add_decayed_weights(fo.cosine_decay_schedule(0.3, 20)),
        optax.add_decayed_weights(double(optax.cosine_decay_schedule(0.3, 20))),
    ),
    Case(
        "add_decayed_weights-schedule_mask",
        fo.add_decayed_weights(fo.cosine_decay_schedule(0.3, 20), MASK),
        optax.add_decayed_weights(double(optax.cosine_decay_schedule(0.3, 20)), MASK),
    ),
    Case("clip", fo.clip(0.7), optax.clip(0.7)),
    # the norm of 383 normal deviates is 19.5 +- 0.7, so that one bound is met always, one never, one half the time
    *(
        Case(f"clip_by_global_norm-{c}", fo.clip_by_global_norm(c), optax.clip_by_global_norm(c))
        for c in (1.0, 19.5, 100.0)
    ),
    Case("clip_by_block_rms", fo.clip_by_block_rms(1.0), optax.clip_by_block_rms(1.0)),
    Case("zero_nans", fo.zero_nans(), optax.zero_nans(), "with_nans"),
    Case("zero_nans-none_found", fo.zero_nans(), optax.zero_nans()),
    Case("params_ema", fo.params_ema(0.9), params_ema(0.9)),
    Case("scale_by_param_block_rms", fo.scale_by_param_block_rms(), optax.scale_by_param_block_rms()),
    Case("scale_by_param_block_norm", fo.scale_by_param_block_norm(1.0), optax.scale_by_param_block_norm(1.0)),
    Case("normalize_by_update_norm", fo.normalize_by_update_norm(2.0, 0.1), optax.normalize_by_update_norm(2.0, 0.1)),
    Case("keep_params_nonnegative", fo.keep_params_nonnegative(), optax.keep_params_nonnegative()),
    Case("muon_momentum", fo.muon_momentum(0.9), muon_momentum(0.9)),
    *(Case(f"params_swa-{s}-{k}", fo.params_swa(s, k), params_swa(s, k)) for s, k in ((0, 3), (1, 1), (4, 5))),
]
IDS = [case.id for case in CASES]
# Of two rules with three switches, half of the rows: every pair of switches is in the other half. Tests that build a
# kernel for each row, where rows of `test_transforms.py` have shown their numbers, leave these out.
SPARE = {
    f"{rule}-eps_in_sqrt={e}-bias_correction={b}-initial_scale={s}"
    for rule in ("scale_by_rms", "scale_by_stddev")
    for e, b, s in product(SWITCHES, SWITCHES, (0.0, 0.5))
    if (e + b + (s == 0.0)) % 2 == 0
}
