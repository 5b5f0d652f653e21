"""Looking into chains: their rules, by path, and chains with others in their places."""

from collections.abc import Callable

from ._fusible import RuleTransformation
from ._transform import GradientTransformation, Path, parts


def rules(tx: GradientTransformation) -> dict[Path, RuleTransformation]:
    """The rules among the `parts` of a transformation.

    Example:
      >>> import functional_optim as fo
      >>> list(rules(fo.adamw(1e-3)).values())
      [scale_by_adam(), add_decayed_weights(weight_decay=0.0001), scale_by_learning_rate(learning_rate=0.001)]
    """
    return {path: part for path, part in parts(tx).items() if isinstance(part, RuleTransformation)}


def rewrite(
    tx: GradientTransformation, fn: Callable[[Path, RuleTransformation], GradientTransformation]
) -> GradientTransformation:
    """The same transformation with its rules replaced by `fn` of their paths and themselves.

    Example:
      >>> import functional_optim as fo
      >>> rewrite(fo.sgd(0.1), lambda path, rule: rule.replace(learning_rate=0.5))
      chain(chain(), scale_by_learning_rate(learning_rate=0.5))
    """
    return tx._rewrite(lambda path, inner: fn(path, inner) if isinstance(inner, RuleTransformation) else inner, ())
