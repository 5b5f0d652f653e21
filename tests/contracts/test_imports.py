"""Imports of the package: their needs, their effects, and the names that they bring."""

import inspect
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_optim as fo
import functional_optim.adapters


ROOT = Path(__file__).parents[2]


def python(code: str, *, warnings: str = "error", **environment: str) -> str:
    """Runs code in a new process that has nothing but the environment it is given, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=ROOT.anchor,
    )
    assert not done.returncode, done.stderr
    return done.stdout


# torch itself imports NumPy if it is there, and says so in a warning if it is not
WITHOUT = """
import warnings

class Blocker:
    asked = set()
    names = {"triton", "numpy", "sklearn", "matplotlib", "optax", "jax", "jaxlib", "tqdm", "hypothesis"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            self.asked.add(name)
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*NumPy")
    import torch

asked = set(Blocker.asked)
import functional_optim as fo
import functional_optim.adapters
assert Blocker.asked == asked, Blocker.asked - asked

torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
x, y = torch.randn(64, 3), torch.randn(64, 1)
tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1), fo.params_ema(0.9))
params = dict(model.named_parameters())
state = tx.init(params)

def loss(params):
    return (torch.func.functional_call(model, params, x) - y).square().mean()

with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    losses = [loss(params).item()]
    for _ in range(30):
        grads = dict(zip(params, torch.autograd.grad(loss(params), list(params.values())), strict=True))
        with torch.no_grad():
            params, state = fo.apply_gradients(tx, params, grads, state, donate=True)
        losses.append(loss(params).item())
assert losses[-1] < losses[0], losses
assert fo.eval_params(state, params)["weight"].isfinite().all()
with torch.no_grad():
    e = fo.explain(tx, params)
print(e.backends, [str(w.message) for w in found])
for backend in ("reference", "foreach", "c", "triton"):
    with fo.use_backend(backend), torch.no_grad():
        try:
            fo.apply_gradients(tx, params, params, state)
            print(backend)
        except RuntimeError as error:
            print(error)
"""


@pytest.mark.slow
def test_with_nothing_but_torch() -> None:
    """No Triton, no NumPy, nothing that only examples and tests need, and no compiler."""
    out = python(WITHOUT, PATH="", HOME="/dev/null")

    assert out.startswith(
        "('foreach',) ['Updates are computed without generated kernels, and slower: there is no C compiler"
    )
    assert out.count("Updates are computed") == 1
    reference, foreach, c, triton = out.splitlines()[1:]
    assert (reference, foreach) == ("reference", "foreach")
    assert "the backend 'c' is asked for, but cannot compute the leaf at 'bias' on cpu: there is no C compiler" in c
    assert "the backend 'triton' is asked for, but cannot compute the leaf at 'bias' on cpu: Triton is not" in triton


IMPORTS_AND_STEPS = """
import json, os
refused = ""
try:
    import adapters
except ImportError as error:
    refused = str(error)
import torch

def new():
    return sorted(set(sys.modules) - before)

before = set(sys.modules)
import functional_optim as fo
import functional_optim.adapters
found = {
    "refused": refused,
    "named": [functional_optim.adapters.__name__, "adapters" in sys.modules],
    "imported": new(),
    "written": os.listdir(os.environ["HOME"]),
}
tx, params = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3)), {"w": torch.ones(3, 2), "b": torch.ones(3)}
state = tx.init(params)
fo.apply_gradients(tx, params, params, state)
fo.apply_gradients(tx, params, {k: p.clone() for k, p in params.items()}, state, donate=True)
print(json.dumps({**found, "stepped": new()}))
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The findings of a new process, which imports torch, then the package, and takes its first steps."""
    home = str(tmp_path_factory.mktemp("home"))
    variables = {"HOME": home, "FUNCTIONAL_OPTIM_CACHE": f"{home}/cache", "PATH": os.environ["PATH"]}
    found: dict[str, Any] = json.loads(python(IMPORTS_AND_STEPS, **variables))
    return found


@pytest.mark.slow
def test_what_importing_imports(process: dict[str, Any]) -> None:
    """Nothing but what it needs; and it touches no disk."""
    # the two that it depends on, and what optree itself imports
    third_party = {name.partition(".")[0] for name in process["imported"]} - sys.stdlib_module_names
    assert third_party <= {"functional_optim", "optree", "torch", "typing_extensions"}
    assert not {"torch._dynamo", "torch._inductor", "torch.onnx"} & set(process["imported"])
    assert process["written"] == []


@pytest.mark.slow
def test_a_first_step_does_not_import_the_compiler(process: dict[str, Any]) -> None:
    """Nor SymPy, which torch imports with some operations on meta: it takes longer than the rest of the step."""
    assert not {"sympy", "torch._dynamo", "torch._inductor"} & set(process["stepped"])


@pytest.mark.slow
def test_adapters_are_imported_by_their_own_name(process: dict[str, Any]) -> None:
    assert re.match(r"import functional_optim\.adapters, not adapters", process["refused"])
    assert process["named"] == ["functional_optim.adapters", False]


def test_the_adapters_folder_and_the_link_are_one() -> None:
    assert Path(functional_optim.adapters.__file__).resolve() == (ROOT / "adapters" / "__init__.py").resolve()


def test_the_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", fo.__version__)


PUBLIC = {name: x for name, x in vars(fo).items() if not name.startswith("_") and not isinstance(x, types.ModuleType)}


def test_the_public_names() -> None:
    """Names of the first release. A name that goes breaks somebody; one that comes is added here."""
    expected = [
        "GradientTransformation",
        "EmptyState",
        "MaskedNode",
        "MaskedState",
        "PartitionState",
        "RuleError",
        "Schedule",
        "Explanation",
        "chain",
        "named_chain",
        "identity",
        "set_to_zero",
        "stateless",
        "stateless_with_tree_map",
        "apply_updates",
        "apply_gradients",
        "masked",
        "partition",
        "multi_transform",
        "elementwise",
        "slot",
        "zeros",
        "use_backend",
        "explain",
        "eval_params",
        "update_average",
        "schedule",
        "scale",
        "scale_by_learning_rate",
        "scale_by_schedule",
        "scale_by_sign",
        "trace",
        "ema",
        "scale_by_adam",
        "scale_by_amsgrad",
        "scale_by_rms",
        "scale_by_stddev",
        "scale_by_lion",
        "scale_by_trust_ratio",
        "add_decayed_weights",
        "clip",
        "clip_by_global_norm",
        "clip_by_block_rms",
        "zero_nans",
        "params_ema",
        "scale_by_lbfgs",
        "scale_by_zoom_linesearch",
        "scale_by_backtracking_linesearch",
        "scale_by_strong_wolfe_linesearch",
        "value_and_grad_from_state",
        "lbfgs",
        "params_swa",
        "sgd",
        "adam",
        "adamw",
        "nadam",
        "nadamw",
        "amsgrad",
        "rmsprop",
        "lion",
        "lars",
        "lamb",
        "sign_sgd",
        "signum",
        "constant_schedule",
        "linear_schedule",
        "polynomial_schedule",
        "exponential_decay",
        "cosine_decay_schedule",
        "warmup_constant_schedule",
        "warmup_cosine_decay_schedule",
        "warmup_exponential_decay_schedule",
        "piecewise_constant_schedule",
        "piecewise_interpolate_schedule",
        "linear_onecycle_schedule",
        "cosine_onecycle_schedule",
        "sgdr_schedule",
        "join_schedules",
        "warmup_stable_decay_schedule",
        "inverse_sqrt_schedule",
        "interpolate_schedule",
        "cosine_annealing_schedule",
        "cosine_restarts_schedule",
        "cyclic_schedule",
        "cumulative_product_schedule",
        "multiply_schedules",
        "from_torch_scheduler",
        "reduce_on_plateau",
        "leaf_sum",
        "leaf_mean",
        "leaf_norm",
        "leaf_amax",
        "tree_sum",
        "tree_norm",
        "tree_amax",
        "cbrt",
    ]

    assert set(expected) <= set(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_documented(name: str) -> None:
    x = PUBLIC[name]
    if name == "zeros":  # a slot, ready made
        x = type(x)
    text = inspect.getdoc(x) or ""

    # one line, with a full stop, that says what it is
    assert re.match(r"[^\n]+\.(\n\n|\n?$)", text), text
    assert "Alias for field" not in text


@pytest.mark.parametrize("name", sorted({*PUBLIC, *fo.adapters.__all__} - {"zeros"}))
def test_every_public_name_has_an_example(name: str) -> None:
    x = PUBLIC[name] if name in PUBLIC else getattr(fo.adapters, name)

    assert ">>> " in (inspect.getdoc(x) or "")


@pytest.mark.parametrize("name", sorted(k for k, x in PUBLIC.items() if hasattr(x, "__signature__")))
def test_every_argument_is_documented(name: str) -> None:
    """Of transformations and schedules: each by its name, under Args."""
    text = inspect.getdoc(PUBLIC[name]) or ""
    arguments = [k for k in inspect.signature(PUBLIC[name]).parameters if k != "count"]

    listed = text.partition("Args:")[2].partition("Returns:")[0]

    assert [k for k in arguments if not re.search(rf"\b{k}\b", listed)] == []


def test_the_types_are_marked() -> None:
    assert (ROOT / "functional_optim" / "py.typed").is_file()


def public_functions() -> list[Any]:
    return [x for x in PUBLIC.values() if inspect.isfunction(x)]


@pytest.mark.parametrize("function", public_functions(), ids=lambda f: f.__name__)
def test_every_public_function_is_annotated(function: Any) -> None:
    signature = inspect.signature(function)

    missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty]

    assert missing == []
    assert signature.return_annotation is not signature.empty


def test_states_are_named_after_their_rules() -> None:
    state = fo.scale_by_adam().init(torch.zeros(2))

    assert (type(state).__name__, state._fields) == ("ScaleByAdamState", ("count", "mu", "nu"))
    assert type(state).__doc__ == "The state of `scale_by_adam`."


FORK = """
import os, signal
import torch
from functional_optim.adapters import AdamW

torch.set_num_threads(2)
torch.ones(1 << 20).exp()  # by two threads
for size in (2, 100):
    params = [torch.nn.Parameter(torch.ones(size)) for _ in range(600)]
    for p in params:
        p.grad = torch.ones(size)
    opt = AdamW(params)
    for _ in range(3):
        opt.step()
    child = os.fork()
    if not child:
        signal.alarm(60)
        opt.step()
        os._exit(0)
    print(size, os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_child_does_not_wait_for_threads_of_its_parent(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "FUNCTIONAL_OPTIM_CACHE": str(tmp_path)}
    assert python(FORK, warnings="default", **environment) == "2 0\n100 0\n"
