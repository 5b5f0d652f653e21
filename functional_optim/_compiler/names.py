"""Names that rules may use, by kind, as messages list them and docs/rules.md shows them.

Each is a row of `OPS` or `REWRITES`. Names that mean the same are joined by `=`, the usual one first.
"""

NAMES: dict[str, str] = {
    "arithmetic": "add sub=subtract mul=multiply div=divide=true_divide floor_divide remainder fmod neg=negative "
    "abs=absolute reciprocal square lerp addcmul addcdiv",
    "rounding and signs": "floor ceil trunc=fix round frac sign=sgn copysign",
    "powers and logarithms": "pow=float_power sqrt rsqrt hypot exp exp2 expm1 log log2 log10 log1p logaddexp sigmoid "
    "erf",
    "angles": "sin cos tan atan=arctan atan2=arctan2 sinh cosh tanh",
    "bounds": "maximum minimum clamp=clip clamp_min clamp_max relu heaviside nan_to_num",
    "comparisons": "gt=greater ge=greater_equal lt=less le=less_equal eq ne=not_equal isfinite isnan isinf",
    "conditions": "where masked_fill logical_and=bitwise_and logical_or=bitwise_or logical_xor=bitwise_xor "
    "logical_not=bitwise_not",
    "casts and copies": "to type_as float double bfloat16 half detach clone zeros_like ones_like full_like",
    "reductions over the leaf": "sum mean norm=vector_norm=linalg_vector_norm amax amin max min numel",
    "of functional_optim": "cbrt leaf_sum leaf_mean leaf_norm leaf_amax leaf_size tree_sum tree_norm tree_amax",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# names by which Python's operators are recorded, and rows of the table that only the tracer writes
HIDDEN = _words(
    "truediv floordiv mod and or xor invert pos radd rsub rmul rdiv rtruediv rpow real broadcast "
    "to_float32 to_bfloat16 to_float16 fused_mean fused_mean_square fused_weight fused_shrink fused_number"
)


def names_of(kind: str) -> list[list[str]]:
    """The names of a kind, each with those that mean the same."""
    return [entry.split("=") for entry in NAMES[kind].split()]


PUBLIC = [name for kind in NAMES for entry in names_of(kind) for name in entry]

RANDOM = "A rule has no random numbers. Declare `extra={'noise': 'element'}`, and pass a tree of them to every step."
WHOLE = (
    "A rule is the formula for one element of any leaf, and its reductions are over the whole leaf. What looks at "
    "shapes, at other elements or along a dimension belongs in a rule for whole tensors: `leafwise`."
)
NUMBER = "A number is only known when the kernel runs. Use `torch.where(condition, a, b)` to choose by it."
_DRAW = _words("rand normal bernoulli dropout multinomial poisson exponential_ geometric_ cauchy_ log_normal uniform_")
_SHAPES = _words(
    "matmul mm bmm mv dot vdot inner outer einsum tensordot addmm addmv baddbmm addr T mT H mH t transpose permute "
    "reshape view flatten squeeze unsqueeze expand cat concat stack hstack vstack split chunk unbind sort argsort topk "
    "kthvalue median cumsum cumprod cummax cummin diff roll flip gather scatter index_select take narrow diag diagonal "
    "trace tril triu argmax argmin size stride dim unique linalg_svd linalg_qr linalg_inv linalg_eigh "
    "softmax log_softmax softmin logsumexp std var std_mean var_mean quantile nanquantile nanmedian mode cov corrcoef "
    "prod histc bincount msort nonzero normalize"
)
_OVER = "; over all leaves `tree_{0}` in place of `leaf_{0}`."
_BY_REDUCTIONS = {
    "any": "Whether a condition holds anywhere in the leaf is `leaf_amax(condition)`" + _OVER.format("amax"),
    "all": "Whether a condition holds everywhere in the leaf is `1 - leaf_amax(~condition)`" + _OVER.format("amax"),
    "count_nonzero": "The number of elements other than 0 is `leaf_sum(x != 0)`" + _OVER.format("sum"),
}


def hint_for(name: str) -> str:
    """Help with a name that rules do not have, where there is better help than the list of those that they have."""
    if name.startswith(tuple(_DRAW)) and name != "normalize":
        return RANDOM
    if name in ("item", "tolist", "numpy"):
        return NUMBER
    if name in _BY_REDUCTIONS:
        return _BY_REDUCTIONS[name]
    return WHOLE if name in _SHAPES else ""


def listed() -> str:
    """All names that rules have, but for second names, in one sentence."""
    own = [entry[0] for entry in names_of("of functional_optim")]
    of_torch = sorted(entry[0] for kind in NAMES for entry in names_of(kind) if entry[0] not in own)
    return f"{', '.join(of_torch)}, and of functional_optim: {', '.join(own)}"
