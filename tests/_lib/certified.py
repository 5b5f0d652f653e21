"""The certified table: facts about every algorithm of torch.optim, each measured when the table is made."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import functional_optim as fo
from _lib.compare import assert_same_bits
from _lib.optimizers import UNITS, content, follow, give, gradients, make_params, params_of
from functional_optim import adapters
from functional_optim._compiler.triton.emit import emit_triton


STEPS = 20
VECTORS = ((16,), (8, 16), (32, 32))
MATRICES = ((16, 16), (8, 24), (24, 8))


class Row(NamedTuple):
    """An algorithm of torch.optim in its three forms.

    Args:
      name: the class.
      ours: the pure form.
      theirs: optax's form; None where optax has none.
      optax: bound on the largest difference of a parameter from optax's, relative to 1; or the reason for none, or
        the sentence that a test of its own proves.
      flags: arguments of torch's class in its most exact implementation.
      units: how far a step may be from torch's, in units of the last place; 0 for the same bits after all steps; or
        the sentence that a test of its own proves.
      options: arguments of both classes.
      shapes: shapes of the parameters.
      proofs: the tests of sentences, and of the switches of a class whose `units` is one.
    """

    name: str
    ours: fo.GradientTransformation | None
    theirs: Callable[[], Any] | None
    optax: float | str
    flags: dict[str, Any]
    units: float | str
    options: Mapping[str, Any] = MappingProxyType({})
    shapes: tuple[tuple[int, ...], ...] = VECTORS
    proofs: tuple[str, ...] = ()


MATRIX_CLASSES = "adapters/test_matrix_classes.py::test_steps_are_those_of_torch"
SPARSE = "adapters/test_sparse.py::test_sparse_adam_is_within_units_of_torch"
ITERATES = "adapters/test_lbfgs.py::test_the_iterates_are_those_of_torch"
DIRECTIONS = "test_lbfgs.py::test_directions_are_those_of_optax"
RPROP = "test_against_numpy.py::test_the_first_step_goes_down_where_that_of_optax_does_not"
FUSED: dict[str, Any] = {"fused": True}
ROWS = [
    Row("SGD", fo.sgd(0.1, 0.9), lambda: optax.sgd(0.1, 0.9), 1e-12, FUSED, 0, {"lr": 0.1, "momentum": 0.9}),
    Row("Adam", fo.adam(0.1), lambda: optax.adam(0.1), 1e-12, FUSED, 0),
    Row("AdamW", fo.adamw(0.1), lambda: optax.adamw(0.1), 1e-12, FUSED, 0),
    Row("NAdam", fo.nadam(0.1), lambda: optax.nadam(0.1), 1e-12, {}, 8),
    Row("RAdam", fo.radam(0.1), lambda: optax.radam(0.1), 1e-12, {}, 8),
    Row("Adamax", fo.adamax(0.1), lambda: optax.adamax(0.1), 1e-12, {}, 0),
    Row("RMSprop", fo.rmsprop(0.1), lambda: optax.rmsprop(0.1), 1e-12, {}, 4),
    Row("Adagrad", fo.adagrad(0.1), lambda: optax.adagrad(0.1), 1e-12, FUSED, 0),
    Row("Adadelta", fo.adadelta(0.1), lambda: optax.adadelta(0.1), 1e-12, {}, 30),
    Row("ASGD", fo.asgd(0.1), None, "optax has none", {}, 0),
    Row("Rprop", fo.rprop(0.1), None, "optax is one step late", {}, 0, proofs=(RPROP,)),
    Row(
        "Muon",
        fo.muon(0.1),
        lambda: optax.contrib.muon(0.1),
        1e-10,
        {},
        "momenta are the same bits; steps as those of bfloat16 products",
        shapes=MATRICES,
        proofs=(MATRIX_CLASSES,),
    ),
    Row(
        "Adafactor",
        fo.adafactor(0.1),
        lambda: optax.adafactor(0.1),
        1e-6,
        {},
        "within 8 units a step",
        proofs=(MATRIX_CLASSES,),
    ),
    Row(
        "SparseAdam",
        adapters.from_torch_optimizer("SparseAdam"),
        None,
        "optax has none",
        {},
        "state the same bits, steps within 4 units",
        proofs=(SPARSE,),
    ),
    Row(
        "LBFGS",
        None,
        None,
        "directions to 1e-12",
        {},
        "iterates, losses and state are the same bits",
        proofs=(DIRECTIONS, ITERATES),
    ),
]


def _numbers(seed: int, shapes: tuple[tuple[int, ...], ...], turn: bool) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    made = {str(k): generator.standard_normal(shape) for k, shape in enumerate(shapes)}
    return {k: jnp.asarray(x.T if turn else x) for k, x in made.items()}


def from_optax(row: Row) -> float:
    """The largest difference of a parameter from optax's after some steps, in float64."""
    assert row.ours is not None
    assert row.theirs is not None
    turn = row.name == "Muon"  # rows are outputs here, and inputs there
    ours = {k: torch.from_numpy(np.array(x.T if turn else x)) for k, x in _numbers(0, row.shapes, turn).items()}
    theirs: Any = _numbers(0, row.shapes, turn)
    tx = row.theirs()
    state, other = row.ours.init(ours), tx.init(theirs)
    update = jax.jit(tx.update) if turn else tx.update  # its loops are compiled in any case
    for step in range(1, STEPS + 1):
        grads = _numbers(step, row.shapes, turn)
        own = {k: torch.from_numpy(np.array(x.T if turn else x)) for k, x in grads.items()}
        ours, state = fo.apply_gradients(row.ours, ours, own, state)
        updates, other = update(grads, other, theirs)
        theirs = optax.apply_updates(theirs, updates)
    return max(float(np.abs(ours[k].numpy() - np.asarray(x.T if turn else x)).max()) for k, x in theirs.items())


def from_torch(row: Row, **switch: Any) -> float:
    """The distance of steps from torch's, in units; 0 if everything is the same bits after all of them."""
    own = {**row.options, **switch}
    made = [
        cls(make_params(torch.float64, row.shapes), **own, **more)
        for cls, more in ((getattr(adapters, row.name), {}), (getattr(torch.optim, row.name), row.flags))
    ]
    for step in range(STEPS):
        for opt in made:
            give(params_of(opt), gradients(params_of(opt), step))
            opt.step()
    try:
        assert_same_bits(*map(content, made))
    except AssertionError:
        pairs = [
            cls(make_params(torch.float64, row.shapes), **own, **more)
            for cls, more in ((getattr(adapters, row.name), {}), (getattr(torch.optim, row.name), row.flags))
        ]
        return max(follow(*pairs, range(STEPS)).values())
    return 0.0


def flags(name: str) -> list[str]:
    """The switches of torch's class, all of which ours takes; whether it obeys them is measured apart."""
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (adapters, torch.optim))
    assert ours.keys() == theirs.keys()
    plain = {"foreach", "capturable", "differentiable", "fused"}
    return [k for k, p in theirs.items() if isinstance(p.default, bool | None) and k not in plain]


def options(name: str) -> dict[str, Any]:
    """Arguments of torch's class that are no switches, and values for them that are not their defaults."""
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    return {k: x for k, x in OTHER_VALUES.items() if k in theirs}


def takes_complex(cls: Any) -> bool:
    """Whether a class takes a step on a complex parameter."""
    p = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    try:
        cls([p], lr=0.1).step()
    except (RuntimeError, ValueError):
        return False
    return True


def takes_sparse(cls: Any) -> bool:
    """Whether a class takes a step on a sparse gradient."""
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones_like(p).to_sparse(1)
    try:
        cls([p], lr=0.1).step()
    except RuntimeError:
        return False
    return True


def kinds(row: Row) -> str:
    """Kinds of tensors beside dense real ones that a class takes, as torch's does.

    Raises:
      AssertionError: torch's class takes others.
    """
    if row.name == "LBFGS":
        return "complex"  # shown by the tests of its iterates
    found = []
    for kind, takes in (("complex", takes_complex), ("sparse", takes_sparse)):
        ours, theirs = (takes(getattr(m, row.name)) for m in (adapters, torch.optim))
        assert ours == theirs, f"{row.name} takes {kind} tensors: {ours}, torch's: {theirs}"
        found += [kind] * ours
    return ", ".join(found) or "-"


def cost(row: Row) -> dict[str, str]:
    """The words of `explain` on a step of the class, in float32."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in row.shapes]
    if row.name == "SparseAdam":  # the step on the rows touched, as one on all of them
        e = fo.explain(row.ours, [p.detach() for p in params])
    else:
        e = fo.explain(getattr(adapters, row.name)(params, **row.options))
    whole = any("computes whole tensors" in note for note in e.notes)
    for kernel in e.kernels:
        emit_triton(kernel.signature)  # raises where there is no form in Triton
    counters = 4 * len(params) / e.parameters  # `step`, a number per tensor
    return {
        "fused on C and Triton": "around torch operations" if whole else "whole",
        "passes": str(e.passes),
        "launches": str(e.launches),
        "bytes": f"{round(e.bytes_per_element)}",
        "state bytes": f"{max(round(e.state_bytes - counters), 0)}" if not whole else f"{e.state_bytes - counters:.2g}",
    }


def certified(row: Row) -> list[str]:
    """The cells of a row. Every number in it has just been measured, or bounds one that has.

    Raises:
      AssertionError: a measured number is beyond its bound.
    """
    if isinstance(row.optax, float):
        found = from_optax(row)
        assert found <= row.optax, f"{row.name} is {found} from optax's, more than {row.optax}"
        optax_cell = f"yes, to {row.optax:.0e}".replace("e-0", "e-")
    else:
        optax_cell = row.optax
    if isinstance(row.units, str):
        torch_cell = row.units
    else:
        theirs = inspect.signature(getattr(torch.optim, row.name)).parameters
        farther = ""
        for option in ("", *flags(row.name), *options(row.name)):
            value = OTHER_VALUES.get(option) if option not in flags(row.name) else not theirs[option].default
            arguments = {option: value} if option else {}
            if option == "decoupled_weight_decay":  # the flag tells how decay is applied
                arguments["weight_decay"] = 0.1
            found, allowed = from_torch(row, **arguments), row.units
            if option in options(row.name) and found > row.units:
                farther, allowed = f"{farther}; within {UNITS[row.name]:g} units with `{option}`", UNITS[row.name]
            assert found <= allowed, f"a step of {row.name}({arguments}) is {found} units from torch's, not {allowed}"
        of = "its fused kernel" if row.flags else "its loop"
        torch_cell = f"the bits of {of}" if row.units == 0 else f"a step within {row.units:g} units of {of}"
        torch_cell += farther
    costs = cost(row) if row.name not in NO_KERNEL else dict.fromkeys(COSTS, "-") | {COSTS[0]: NO_KERNEL[row.name]}
    switches = ", ".join(f"`{flag}`" for flag in (*flags(row.name), *options(row.name))) or "-"
    return [f"`{row.name}`", optax_cell, torch_cell, switches, kinds(row), *(costs[k] for k in COSTS)]


NO_KERNEL = {"LBFGS": "torch operations"}  # classes whose steps `explain` cannot count beforehand
OTHER_VALUES: dict[str, Any] = {
    "weight_decay": 0.1,
    "dampening": 0.5,
    "momentum_decay": 0.01,
    "lr_decay": 0.1,
    "initial_accumulator_value": 0.1,
    "step_sizes": (0.2, 0.3),
    "t0": 3.0,
    "d": 0.5,
}
COSTS = ("fused on C and Triton", "passes", "launches", "bytes", "state bytes")
HEAD = """# Certified

The algorithms of torch.optim, as measured when this page was made. Written by `docs/make_certified.py`; a
test makes the table anew and compares.

- *Equals optax*: the largest difference of a parameter after 20 steps in float64. A reason stands there if
  there is nothing to compare with: optax has no such algorithm, or its own has a fault
  ([numerics.md](numerics.md)).
- *Equals torch.optim*: parameters and state of the class beside torch's, float64, 20 steps. A unit is one
  in the last place of the largest number in a sum. Measured with the defaults, and with each switch and
  option.
- *Switches and options* of torch's class that ours obeys, besides `foreach`, `capturable`, `differentiable`
  and `fused`, which choose an implementation, and besides `lr`, decays of moments and `eps`.
- *Also takes*: complex parameters and sparse gradients, where torch's class does.
- *Passes* over memory, *launches* of kernels, and *bytes* read and written per element, float32, of a step
  of the class with its defaults (SGD with momentum); *state bytes* per element. Rules for whole tensors are
  computed by torch operations, whose bytes are not counted; `SparseAdam` moves those of the rows touched.

"""


TAIL = """
Cells with a sentence instead of a number are shown by tests of their own, in `tests/contracts/`:

"""


def page() -> str:
    """The whole of docs/certified.md."""
    header = ["class", "equals optax", "equals torch.optim", "switches and options", "also takes", *COSTS]
    table: list[list[str]] = [header, ["---"] * len(header), *map(certified, ROWS)]
    proofs = "\n".join(f"- `{row.name}`: `{proof}`" for row in ROWS for proof in row.proofs)
    return HEAD + "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n" + TAIL + proofs + "\n"
