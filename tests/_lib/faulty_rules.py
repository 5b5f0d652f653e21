"""Rules that cannot become kernels, with the messages that refuse them.

The line at fault is marked; where none is, the message names the line of `def`.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import functional_optim as fo


VECTOR = torch.arange(3.0)


def branches(u: Any) -> Any:
    if u > 0:  # at fault
        return u
    return -u


def chooses(u: Any) -> Any:
    return u if u.abs() < 1 else u / 2  # at fault


def joins_conditions(u: Any, p: Any) -> Any:
    return torch.where(u > 0 and p > 0, u, p)  # at fault


def compares_a_schedule(u: Any, *, step: Any) -> Any:
    return u if step > 10 else 2 * u  # at fault


def iterates(u: Any) -> Any:
    return sum(x for x in u)  # at fault


def unpacks(u: Any) -> Any:
    first, _ = u  # at fault
    return first


def takes_a_float(u: Any) -> Any:
    return u * float(u)  # at fault


def takes_an_int(u: Any, *, step: Any) -> Any:
    return u * int(step)  # at fault


def takes_a_root_in_python(u: Any, *, k: float = 2.0) -> Any:
    return u * math.sqrt(k)  # at fault


def takes_an_item(u: Any) -> Any:
    return u * u.item()  # at fault


def looks_at_the_shape(u: Any) -> Any:
    return u / u.shape[0]  # at fault


def looks_at_the_dtype(u: Any) -> Any:
    return u.to(u.dtype)  # at fault


def looks_at_the_device(u: Any) -> Any:
    return torch.zeros(3, device=u.device)  # at fault


def takes_the_length(u: Any) -> Any:
    return u / len(u)  # at fault


def misspells(u: Any) -> Any:
    return u.absolut()  # at fault


def rounds_in_python(u: Any, *, k: float = 2.0) -> Any:
    return u * math.exp(-math.log(k))  # at fault


def rounds_to_decimals(u: Any) -> Any:
    return torch.round(u, decimals=2)  # at fault


def takes_the_mean_of_rows(u: Any) -> Any:
    return u - u.mean(dim=1)  # at fault


def takes_the_largest_of_rows(u: Any) -> Any:
    return u / u.amax(1)  # at fault


def takes_the_size_of_a_number(u: Any, *, step: Any) -> Any:
    return u / fo.leaf_size(step)  # at fault


def sorts(u: Any) -> Any:
    return torch.sort(u)  # at fault


def draws(u: Any) -> Any:
    return u + torch.randn_like(u)  # at fault


def normalizes_rows(u: Any) -> Any:
    return torch.nn.functional.normalize(u, dim=0)  # at fault


def calls_a_method(u: Any) -> Any:
    return u.cumsum(0)  # at fault


def multiplies_matrices(u: Any, p: Any) -> Any:
    return u @ p  # at fault


def indexes(u: Any) -> Any:
    return u[0]  # at fault


def transposes(u: Any) -> Any:
    return 2 * u.T  # at fault


def stacks(u: Any, p: Any) -> Any:
    return torch.stack([u, p])  # at fault


def writes_in_place(u: Any) -> Any:
    u.mul_(2.0)  # at fault
    return u


def writes_in_place_by_function(u: Any, p: Any) -> Any:
    torch.relu_(u)  # at fault
    return u


def writes_an_element(u: Any) -> Any:
    u[0] = 1.0  # at fault
    return u


def sums_a_dimension(u: Any) -> Any:
    return u / u.sum(dim=0)  # at fault


def takes_an_unknown_norm(u: Any) -> Any:
    return u / torch.linalg.vector_norm(u, 3)  # at fault


def multiplies_in_place(u: Any) -> Any:
    return u.mul_(2.0)  # at fault


def takes_the_norm_of_a_dimension(u: Any) -> Any:
    return u / torch.norm(u, dim=0)  # at fault


def casts_to_whole_numbers(u: Any) -> Any:
    return u.to(torch.int32)  # at fault


def replaces_infinity_by_the_largest_number(u: Any) -> Any:
    return torch.nan_to_num(u)  # at fault


def reduces_a_dimension(u: Any) -> Any:
    return u / torch.max(u, 0)  # at fault


def keeps_in_a_set(u: Any) -> Any:
    return u if u in {u} else 2 * u  # at fault


def captures_a_vector(u: Any) -> Any:
    return u + VECTOR  # at fault


def captures_a_vector_first(u: Any) -> Any:
    return VECTOR * u  # at fault


def adds_a_list(u: Any) -> Any:
    return u * [1.0]  # at fault


def sums_a_uniform_value(u: Any, *, k: float = 2.0) -> Any:
    return u / fo.leaf_sum(k * k)  # at fault


def sums_a_step(u: Any, *, step: Any) -> Any:
    return u / torch.mean(step)  # at fault


def sums_a_norm_over_the_tree(u: Any) -> Any:
    return u / fo.tree_sum(fo.leaf_norm(u))  # at fault


def makes_a_tensor(u: Any, *, k: Any = 2.0) -> Any:
    return u * torch.log(torch.as_tensor(k))  # at fault


def divides_with_a_rest(u: Any, p: Any) -> Any:
    return divmod(u, p)[1]  # at fault


def divides_a_number_with_a_rest(u: Any) -> Any:
    return divmod(2.0, u)[0]  # at fault


def asks_all(u: Any) -> Any:
    return torch.where(torch.isfinite(u).all(), u, 0.0)  # at fault


def asks_any(u: Any) -> Any:
    return torch.where(torch.any(u > 1), u, 0.0)  # at fault


def counts(u: Any) -> Any:
    return u / torch.count_nonzero(u)  # at fault


def normalizes(u: Any) -> Any:
    return torch.nn.functional.softmax(u, 0)  # at fault


def standardizes(u: Any) -> Any:
    return u / u.std()  # at fault


def takes_a_quantile(u: Any) -> Any:
    return u / torch.quantile(u, 0.5)  # at fault


def rectifies_in_place(u: Any) -> Any:
    return torch.nn.functional.relu(u, inplace=True)  # at fault


def writes_into_another(u: Any, p: Any) -> Any:
    return torch.exp(u, out=p)  # at fault


def sums_a_number_of_python(u: Any) -> Any:
    return u / fo.leaf_sum(1.0)  # at fault


def sums_a_number_of_python_over_the_tree(u: Any) -> Any:
    return u / fo.tree_sum(1.0)  # at fault


def forgets_a_slot(u: Any, mu: Any) -> Any:
    return u + mu


def returns_too_much(u: Any, mu: Any) -> Any:
    return u, mu, u


def returns_nothing(u: Any) -> Any:
    u = 2 * u


def returns_a_string(u: Any, mu: Any) -> Any:
    return u, "mu"


def returns_a_vector(u: Any) -> Any:
    return VECTOR


def stores_elements_as_one_number(u: Any, best: Any) -> Any:
    return u, torch.maximum(best, u)


class Faulty(NamedTuple):
    """A rule that is refused when it is first used.

    Args:
      rule: the formula.
      message: a part of the message, besides the name and the line.
      slots: its slots of state.
    """

    rule: Callable[..., Any]
    message: str
    slots: Mapping[str, Any] = MappingProxyType({})


MU, BEST = {"mu": fo.zeros}, {"best": fo.slot(per="leaf")}
WHOLE = "A rule is the formula for one element of any leaf, and its reductions are over the whole leaf."
KNOWN_WHEN_RUN = "only known when the kernel runs. Use `torch.where"
FAULTY = [
    Faulty(branches, KNOWN_WHEN_RUN),
    Faulty(chooses, KNOWN_WHEN_RUN),
    Faulty(joins_conditions, KNOWN_WHEN_RUN),
    Faulty(compares_a_schedule, KNOWN_WHEN_RUN),
    Faulty(iterates, "iterates"),
    Faulty(unpacks, "iterates"),
    Faulty(takes_a_float, "takes the number behind a traced value"),
    Faulty(takes_an_int, "takes the number behind a traced value"),
    Faulty(takes_a_root_in_python, "Use torch's: `torch.sqrt` for `math.sqrt`."),
    Faulty(
        takes_an_item, "`item`, which has no row in the operation table. A number is only known when the kernel runs"
    ),
    Faulty(looks_at_the_shape, "reads `.shape`"),
    Faulty(looks_at_the_dtype, "reads `.dtype`"),
    Faulty(looks_at_the_device, "reads `.device`"),
    Faulty(takes_the_length, "takes the length of a traced value. Use `leaf_size`"),
    Faulty(misspells, "`absolut`, which has no row in the operation table. Near to it: absolute, "),
    Faulty(misspells, "A rule can use: abs, add, "),
    Faulty(
        misspells, "and of functional_optim: cbrt, leaf_sum, leaf_mean, leaf_norm, leaf_amax, leaf_size, tree_sum, "
    ),
    Faulty(rounds_in_python, "Use torch's: `torch.exp` for `math.exp`, `torch.log` for `math.log`."),
    Faulty(rounds_to_decimals, "scale before and after"),
    Faulty(takes_the_mean_of_rows, f"calls `mean` in a form that has no kernel: it reduces along a dimension. {WHOLE}"),
    Faulty(takes_the_largest_of_rows, "calls `amax` in a form that has no kernel: it reduces along a dimension."),
    Faulty(takes_the_size_of_a_number, "the same for every element"),
    Faulty(sorts, f"`sort`, which has no row in the operation table. {WHOLE}"),
    Faulty(draws, "`randn_like`, which has no row in the operation table. A rule has no random numbers."),
    Faulty(normalizes_rows, f"`normalize`, which has no row in the operation table. {WHOLE}"),
    Faulty(calls_a_method, f"`cumsum`, which has no row in the operation table. {WHOLE}"),
    Faulty(multiplies_matrices, f"`matmul`, which has no row in the operation table. {WHOLE}"),
    Faulty(indexes, f"indexes a traced value. {WHOLE}"),
    Faulty(transposes, "`T`"),
    Faulty(stacks, "`stack`, which has no row"),
    Faulty(writes_in_place, "mul_"),
    Faulty(writes_in_place_by_function, "relu_"),
    Faulty(writes_an_element, ""),
    Faulty(sums_a_dimension, "`sum` in a form that has no kernel"),
    Faulty(takes_an_unknown_norm, "of order 1, 2 or inf"),
    Faulty(multiplies_in_place, "`mul_`, which writes in place"),
    Faulty(takes_the_norm_of_a_dimension, "`norm` in a form that has no kernel"),
    Faulty(casts_to_whole_numbers, "torch.int32 is not a floating dtype"),
    Faulty(replaces_infinity_by_the_largest_number, "give `posinf` and `neginf`"),
    Faulty(reduces_a_dimension, "`max` in a form that has no kernel"),
    Faulty(keeps_in_a_set, "only known when the kernel runs"),
    Faulty(captures_a_vector, "a tensor of shape (3,)"),
    Faulty(captures_a_vector_first, "a tensor of shape (3,)"),
    Faulty(adds_a_list, "uses [1.0] as a number"),
    Faulty(sums_a_uniform_value, "the same for every element"),
    Faulty(sums_a_step, "the same for every element"),
    Faulty(sums_a_norm_over_the_tree, "the same for every element"),
    Faulty(makes_a_tensor, "operations of torch take a traced number as it is"),
    Faulty(divides_with_a_rest, "write `x // y` and `x % y`"),
    Faulty(divides_a_number_with_a_rest, "write `x // y` and `x % y`"),
    Faulty(asks_all, "is `1 - leaf_amax(~condition)`; over all leaves `tree_amax`"),
    Faulty(asks_any, "is `leaf_amax(condition)`; over all leaves `tree_amax`"),
    Faulty(counts, "is `leaf_sum(x != 0)`; over all leaves `tree_sum`"),
    Faulty(normalizes, f"`softmax`, which has no row in the operation table. {WHOLE}"),
    Faulty(standardizes, f"`std`, which has no row in the operation table. {WHOLE}"),
    Faulty(takes_a_quantile, f"`quantile`, which has no row in the operation table. {WHOLE}"),
    Faulty(rectifies_in_place, "leave `inplace` out"),
    Faulty(writes_into_another, "`exp` in a form that has no kernel: it got an unexpected keyword argument 'out'"),
    Faulty(sums_a_number_of_python, "calls `leaf_sum` of 1.0, expected a tensor"),
    Faulty(sums_a_number_of_python_over_the_tree, "calls `tree_sum` of 1.0, expected a tensor"),
    Faulty(forgets_a_slot, "returned 1 results, expected 2: (u, mu)", MU),
    Faulty(returns_too_much, "returned 3 results, expected 2: (u, mu)", MU),
    Faulty(returns_nothing, "returned NoneType for `u`"),
    Faulty(returns_a_string, "returned str for `mu`", MU),
    Faulty(returns_a_vector, "returned Tensor for `u`"),
    Faulty(stores_elements_as_one_number, "differs per element, but its slot holds one number per leaf", BEST),
]
