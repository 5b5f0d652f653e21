"""Drawn sequences of events between steps: an optimizer beside torch's, and beside one that remembers nothing."""

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from _lib.drawn import same_each_time
from _lib.events import (
    around,
    carry,
    cast_and_back,
    change_param,
    change_state,
    drawn_gradient,
    give_gradient,
    regroup,
    remove_or_add,
    set_option,
)
from _lib.trees import F64
from _lib.worlds import CHAINS, DECAYS, FLAGS, HOOKS, NAMED, OPTIONS, RATES, SHAPES, Before, World, attempt, close


GRADS = [
    "random",
    "random",
    "none",
    "keep",
    "zero",
    "transposed",
    "expanded",
    "sliced",
    "in place",
    "shared",
    "sparse",
    "huge",
]


class Beside(RuleBasedStateMachine):
    """Worlds in which the same happens: torch's optimizer, ours, and ours that forgets between steps."""

    kinds: ClassVar[list[str]] = [*NAMED, *CHAINS]

    @initialize(
        data=st.data(),
        seed=st.integers(0, 9),
        groups=st.integers(1, 3),
        forgets=st.sampled_from(["load", "copy"]),
        complex_=st.booleans(),
    )
    def start(self, data: Any, seed: int, groups: int, forgets: str, complex_: bool) -> None:
        kind = data.draw(st.sampled_from(self.kinds))
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(shape, generator=generator, dtype=F64) for shape in SHAPES]
        values[3] = values[3].to(memory_format=torch.channels_last)
        values[5] = values[5].t().clone().t()
        if kind == "SparseAdam":
            values = [values[k] for k in (0, 1, 5, 6)]
        elif complex_ and kind != "whole tensors":
            values.append(torch.randn(3, generator=generator, dtype=torch.complex128))
        options: dict[str, Any] = {}
        if kind in NAMED:
            names = OPTIONS[kind]
            options = {"lr": 0.1} | {k: data.draw(st.sampled_from(v)) for k, v in names.items()}
            if kind != "SparseAdam" and kind != "Rprop":
                options["weight_decay"] = data.draw(st.sampled_from(DECAYS))
            if kind == "SGD" and options["nesterov"]:
                options |= {"momentum": 0.9, "dampening": 0.0}
        self.kind, self.forgets = kind, forgets
        self.worlds = {"ours": World(kind, True, values, groups, options)}
        self.worlds["forgetful"] = World(kind, True, values, groups, options)
        self.torch = kind in NAMED
        if self.torch:
            self.worlds["theirs"] = World(kind, False, values, groups, options)
        self.bound = 1e-6 if kind in ("NAdam", "ASGD") else 1e-9  # of float32 numbers, which torch loads as float64
        self.seed = 100 * seed
        self.said = ""

    # -- the same for all

    def each(self, fn: Callable[[World], Any]) -> None:
        """Does the same in all worlds, which come to the same."""
        found = {name: attempt(lambda w=w: fn(w)) for name, w in self.worlds.items()}
        errors = {name: e.error for name, e in found.items()}
        if any(errors.values()) and not all(errors.values()):
            raise AssertionError(f"only some fail: {errors}") from next(e for e in errors.values() if e)

    def compare(self) -> None:
        ours = self.worlds["ours"]
        for name, other in self.worlds.items():
            if other is ours:
                continue
            bound = 0.0 if name == "forgetful" else self.bound
            for k, (p, q) in enumerate(zip(ours.params, other.params, strict=True)):
                where = f"{name}, params[{k}]"
                assert p.dtype == q.dtype
                assert p.requires_grad == q.requires_grad
                assert p.stride() == q.stride(), f"{where}: {p.stride()} {q.stride()}"
                close(p, q, bound, where)
                a, b = ours.state(k), other.state(k)
                if a or b or name == "forgetful":
                    assert a.keys() == b.keys(), f"state of {where}: {a.keys()} {b.keys()}"
                    assert name == "theirs" or list(a) == list(b), f"state of {where}: {a.keys()} {b.keys()}"
                for key in a:
                    close(a[key], b[key], bound, f"{key} of {where}")
            groups = [
                [
                    {k: x for k, x in g.items() if k not in ("params", "foreach", "fused", "differentiable")}
                    for g in w.opt.param_groups
                ]
                for w in (ours, other)
            ]
            for a, b in zip(*groups, strict=True):
                assert a.keys() == b.keys(), f"{name}: {a.keys()} {b.keys()}"
                for key, x in a.items():
                    y = b[key]
                    if isinstance(x, (tuple, list)):
                        assert [float(z) for z in x] == [float(z) for z in y], f"{name}, {key}: {x} {y}"
                    else:
                        assert x == y, f"{name}, {key}: {x} {y}"
            places = [
                [[next(i for i, r in enumerate(w.params) if r is p) for p in g["params"]] for g in w.opt.param_groups]
                for w in (ours, other)
            ]
            assert places[0] == places[1]

    def forget(self) -> None:
        w = self.worlds["forgetful"]
        if self.forgets == "copy":
            w.adopt(copy.copy(w.opt))
            return
        opt = w.fresh()
        if not self.lacks_slots():
            opt.load_state_dict(w.opt.state_dict())
            w.adopt(opt)

    def lacks_slots(self) -> bool:
        """Whether a switch has been set since the last step, so that the state lacks slots and is not loaded."""
        w = self.worlds["ours"]
        found = attempt(lambda: w.fresh().load_state_dict(w.opt.state_dict()))
        return isinstance(found.error, ValueError) and " lacks " in str(found.error)

    def resync(self) -> None:
        """Gives torch's optimizer what ours has, where torch cannot go on and ours can."""
        ours, theirs = self.worlds["ours"], self.worlds["theirs"]
        for p, q in zip(ours.params, theirs.params, strict=True):
            q.data.copy_(p.detach())
            if p in ours.opt.state:
                theirs.opt.state[q] = {
                    k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in ours.opt.state[p].items()
                }
            else:
                theirs.opt.state.pop(q, None)
        for a, b in zip(
            ours.opt.param_groups, theirs.opt.param_groups, strict=True
        ):  # hooks have run here and not there
            for key in a:
                if key not in ("params", "foreach", "fused", "differentiable"):
                    b[key] = copy.deepcopy(a[key])
        for p, q in zip(ours.params, theirs.params, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()

    def take(self, call: Callable[[World], Any], exact: bool = True) -> None:
        """Takes a step in all worlds."""
        self.forget()
        self.compare()
        before = {name: Before(w) for name, w in self.worlds.items()}
        found = {name: attempt(lambda w=w: call(w)) for name, w in self.worlds.items()}
        ours, forgetful = found["ours"], found["forgetful"]
        if (ours.error is None) != (forgetful.error is None) or (
            ours.error and (type(ours.error), str(ours.error)) != (type(forgetful.error), str(forgetful.error))
        ):
            raise AssertionError(f"ours: {ours.error!r}\nforgetful: {forgetful.error!r}") from (
                ours.error or forgetful.error
            )
        theirs = found.get("theirs")
        touching = {"other gradients", "gradients in place", "no gradient", "rate"} & set(self.worlds["ours"].hooks)
        if ours.error is not None:
            if exact and not touching:
                before["ours"].check(self.worlds["ours"])
            if theirs is not None and theirs.error is None:
                self.refused(ours.error)
            if theirs is not None:
                before["theirs"].restore(self.worlds["theirs"])
                self.resync()
        else:
            if exact and not touching:
                before["ours"].check_grads()
            if theirs is not None and theirs.error is not None:
                before["theirs"].restore(self.worlds["theirs"])
                self.resync()
        self.compare()

    def refused(self, error: Exception) -> None:
        """Takes a refusal that torch does not share for right where documents say so."""
        text = str(error)
        known = ("share memory", "expected a finite number", "averaged_params")
        if not any(x in text for x in known):
            raise AssertionError(f"only ours refuses: {error!r}") from error

    def draw(self, p: torch.Tensor, how: str) -> torch.Tensor:
        self.seed += 1
        return drawn_gradient(p, how, torch.Generator().manual_seed(self.seed))

    # -- gradients

    @rule(
        hows=st.lists(st.sampled_from(GRADS), min_size=len(SHAPES) + 1, max_size=len(SHAPES) + 1), sparse=st.booleans()
    )
    def give(self, hows: list[str], sparse: bool) -> None:
        """Gives every parameter a gradient, in some form."""
        sparse = sparse or self.kind == "SparseAdam"
        for k in range(len(self.worlds["ours"].params)):
            how = hows[k % len(hows)]
            if self.kind == "SparseAdam" and how not in ("none", "keep", "sparse"):
                how = "sparse"
            if how == "sparse" and not sparse:
                how = "random"
            g = self.draw(self.worlds["ours"].params[k], how)
            for w in self.worlds.values():
                give_gradient(w, k, g, how)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.each(lambda w: w.opt.zero_grad(set_to_none=to_none))

    # -- steps

    @rule(
        how=st.sampled_from(["plain", "plain", "no_grad", "enable_grad", "float64", "threads", "reference", "foreach"])
    )
    def step(self, how: str) -> None:
        if how == "float64" and self.forgets == "load" and self.kind in ("NAdam", "ASGD"):
            return  # numbers are loaded in the default dtype of their time

        def call(w: World) -> None:
            with around(how):
                w.opt.step()

        self.take(call)

    @rule(zero=st.booleans(), to_none=st.booleans(), no_grad=st.booleans())
    def closure_step(self, zero: bool, to_none: bool, no_grad: bool) -> None:
        if self.kind == "SparseAdam":
            return
        losses = {}

        def call(w: World) -> None:
            def closure() -> torch.Tensor:
                if zero:
                    w.opt.zero_grad(set_to_none=to_none)
                loss = sum((p * p.conj()).real.sum() * (0.5 + k) for k, p in enumerate(w.params) if p.requires_grad)
                if isinstance(loss, torch.Tensor):
                    for p in w.params:
                        if (p.grad is not None and p.grad.is_sparse) or (
                            p.grad is not None and p.grad.dtype != p.dtype
                        ):
                            p.grad = None
                        if p.grad is not None:
                            p.grad = p.grad.clone(memory_format=torch.contiguous_format)
                    loss.backward()
                return loss

            with torch.set_grad_enabled(not no_grad):
                losses[id(w)] = w.opt.step(closure)

        self.take(call, exact=False)

    @rule(unscale=st.booleans(), bad=st.sampled_from([None, None, math.inf, math.nan]), at=st.integers(0, 7))
    def scaled_step(self, unscale: bool, bad: float | None, at: int) -> None:
        """A step by a scaler, which takes it or does not."""
        if self.kind == "SparseAdam":
            return
        if all(q.grad is None for q in self.worlds["ours"].owned()):
            return
        if any(
            p.is_complex() or (p.grad is not None and (p.grad.is_sparse or 0 in p.grad.stride()))
            for p in self.worlds["ours"].params
        ):
            return
        if len({id(p.grad) for p in self.worlds["ours"].params if p.grad is not None}) < sum(
            p.grad is not None for p in self.worlds["ours"].params
        ):
            return

        def call(w: World) -> None:
            w.scaler.scale(torch.ones(()))
            scale = w.scaler.get_scale()
            p = w.params[at % len(w.params)]
            for q in w.owned():
                if q.grad is not None:
                    q.grad = q.grad * scale
            if bad is not None and p.grad is not None and p.numel():
                p.grad = torch.full_like(p.grad, bad)
            if unscale:
                w.scaler.unscale_(w.opt)
            w.scaler.step(w.opt)
            w.scaler.update()

        self.take(call, exact=False)
        for w in self.worlds.values():
            if w.scaler._per_optimizer_states:
                w.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        if any(p.grad is not None and not p.grad.isfinite().all() for p in self.worlds["ours"].params):
            self.each(lambda w: w.opt.zero_grad())
            self.each(lambda w: [setattr(p, "grad", None) for p in w.params])

    # -- options

    @rule(
        data=st.data(),
        k=st.integers(0, 3),
        form=st.sampled_from(["number", "number", "tensor", "in place", "one element"]),
    )
    def option(self, data: Any, k: int, form: str) -> None:
        if self.kind in CHAINS:
            known = self.worlds["ours"].group(k)
            name = data.draw(st.sampled_from(sorted(x for x in known if isinstance(known[x], (float, torch.Tensor)))))
            value: Any = data.draw(st.sampled_from([0.1, 0.5]))
        else:
            names = {"lr": RATES, **OPTIONS[self.kind]}
            if self.kind != "SparseAdam":
                names |= {"maximize": FLAGS}
            if self.kind not in ("SparseAdam", "Rprop"):
                names |= {"weight_decay": DECAYS}
            name = data.draw(st.sampled_from(sorted(names)))
            value = data.draw(st.sampled_from(names[name]))

        self.each(lambda w: set_option(w, name, k, value, form))

    @rule(
        k=st.integers(0, 3),
        how=st.sampled_from(
            ["equal dict", "all equal dicts", "reversed params", "new list", "to the next", "reversed groups", "update"]
        ),
    )
    def regroup(self, k: int, how: str) -> None:
        self.each(lambda w: regroup(w, k, how))

    @rule(k=st.integers(0, 7), back=st.booleans())
    def remove_and_add(self, k: int, back: bool) -> None:
        """Takes a parameter out of its group, or puts it back in a group of its own."""

        self.each(lambda w: remove_or_add(w, k, back, keep_state=self.forgets != "load"))

    @precondition(lambda self: len(self.worlds["ours"].params) < 12)
    @rule(shape=st.sampled_from([(2, 2), (5,), ()]), lr=st.sampled_from([None, 0.05]))
    def add_group(self, shape: tuple[int, ...], lr: float | None) -> None:
        if self.kind == "SparseAdam" and not shape:
            return
        x = self.draw(torch.zeros(shape, dtype=F64), "random")

        def change(w: World) -> None:
            p = torch.nn.Parameter(x.clone())
            w.params.append(p)
            w.opt.add_param_group({"params": p} | ({} if lr is None else {"lr": lr}))

        self.each(change)

    # -- parameters

    @rule(
        k=st.integers(0, 7),
        how=st.sampled_from(
            [
                "freeze",
                "thaw",
                "clone",
                "other layout",
                "view",
                "set_",
                "swap",
                "in place",
                "no_grad copy",
                "module.to",
                "offset",
                "data set_",
            ]
        ),
    )
    def change_param(self, k: int, how: str) -> None:
        self.each(lambda w: change_param(w, k, how))

    @rule(k=st.integers(0, 7), flag=st.sampled_from(["data", "swap", "overwrite"]))
    def round_trip(self, k: int, flag: str) -> None:
        """A module that is cast to another type and back, with its gradient, by each of torch's ways."""
        if self.worlds["ours"].params[k % len(self.worlds["ours"].params)].is_complex():
            return

        self.each(lambda w: cast_and_back(w, k, flag))

    # -- states

    @rule(
        k=st.integers(0, 7),
        how=st.sampled_from(
            [
                "del",
                "clear",
                "pop",
                "in place",
                "replace",
                "other layout",
                "view",
                "count",
                "new dict",
                "equal",
                "double count",
                "share",
            ]
        ),
        which=st.integers(0, 3),
    )
    def change_state(self, k: int, how: str, which: int) -> None:
        if self.kind == "one for the tree" and how in ("in place", "replace", "new dict", "share"):
            return
        if self.kind in ("Adagrad", "whole tensors") and how in ("del", "clear", "pop"):
            return

        self.each(lambda w: change_state(w, self.kind, k, how, which))

    @rule(
        how=st.sampled_from(
            ["deepcopy", "pickle", "load", "save and load", "cross", "load in place", "setstate", "hooks"]
        )
    )
    def copy_all(self, how: str) -> None:
        if how == "cross" and self.torch and not self.lacks_slots():
            found = {name: attempt(w.opt.state_dict) for name, w in self.worlds.items()}
            if not any(e.error for e in found.values()):
                self.cross({name: e.result for name, e in found.items()})
            return

        if how not in ("deepcopy", "pickle", "setstate") and self.lacks_slots():
            return
        self.each(lambda w: carry(w, how))

    def cross(self, dicts: dict[str, Any]) -> None:
        """Ours goes on from torch's file, and torch's from ours."""
        for name, w in self.worlds.items():
            opt = w.fresh()
            found = attempt(lambda: opt.load_state_dict(dicts["ours" if name == "theirs" else "theirs"]))
            if found.error:
                raise AssertionError("ours does not load torch's state") from found.error
            w.adopt(opt)
        ours = self.worlds["ours"]
        for p, q in zip(ours.params, self.worlds["theirs"].params, strict=True):
            with torch.no_grad():
                q.copy_(p)
            if p in ours.opt.state:
                self.worlds["theirs"].opt.state[q] = {
                    k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in ours.opt.state[p].items()
                }

    @rule(name=st.sampled_from(sorted(HOOKS)))
    def hook(self, name: str) -> None:
        if name in ("gradients in place", "other gradients") and self.kind == "SparseAdam":
            return
        self.each(lambda w: w.hook(name))

    # -- failures

    @rule(k=st.integers(0, 7), how=st.sampled_from(["shape", "rate", "params", "state", "betas"]))
    def failing_step(self, k: int, how: str) -> None:
        if self.kind == "SparseAdam":
            return
        ours = {name: w for name, w in self.worlds.items() if w.ours}
        undo: list[Callable[[], None]] = []
        for w in ours.values():
            p = w.params[k % len(w.params)]
            if not any(p is q for q in w.owned()):
                return
            if how == "shape":
                if p.grad is None or p.grad.is_sparse:
                    return
                old = p.grad
                p.grad = torch.ones_like(p)
                p.grad.data = torch.ones(7, dtype=p.dtype)
                undo.append(lambda p=p, old=old: setattr(p, "grad", old))
            elif how == "params":
                if p.grad is None:
                    return
                old = p.data
                p.data = torch.ones(9, dtype=p.dtype)
                undo.append(lambda p=p, old=old: setattr(p, "data", old))
            elif how == "state":
                state = w.opt.state.get(p, {})
                keys = [x for x in sorted(state) if isinstance(state[x], torch.Tensor) and state[x].ndim]
                if not keys or p.grad is None:
                    return
                old = state[keys[0]]
                state[keys[0]] = torch.ones(9, dtype=p.dtype)
                undo.append(lambda state=state, key=keys[0], old=old: state.__setitem__(key, old))
            else:
                group = w.group(k)
                name = "betas" if how == "betas" and "betas" in group else "lr"
                if not any(q.grad is not None for q in group["params"]):
                    return
                old = group[name]
                group[name] = "0.1"
                undo.append(lambda group=group, name=name, old=old: group.__setitem__(name, old))
        for w in ours.values():
            hooks = dict(w.hooks)
            for name in hooks:
                w.hook(name)
            before = Before(w)
            found = attempt(w.opt.step)
            assert found.error is not None, f"a step with a bad {how} is taken"
            before.check(w)
            before.check_grads()
            for name in hooks:
                w.hook(name)
        for fn in undo:
            fn()
        self.compare()

    @rule()
    def averaged(self) -> None:
        if self.kind != "clip + AdamW + EMA" or not any(self.worlds["ours"].opt.state.values()):
            return

        def look(w: World) -> list[torch.Tensor]:
            with w.opt.averaged_params():
                return [p.detach().clone() for p in w.params]

        found = [attempt(lambda w=w: look(w)) for w in self.worlds.values()]
        assert [type(x.error) for x in found] == [type(found[0].error)] * len(found), found
        if not found[0].error:
            for x in zip(*(f.result for f in found), strict=True):
                assert torch.equal(x[0], x[1])
        self.compare()


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [NAMED, list(CHAINS)], ids=["classes", "chains"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_drawn_sequences_of_events_beside_torch_and_beside_an_optimizer_that_forgets(kinds: list[str]) -> None:
    machine = type("Machine", (Beside,), {"kinds": kinds})
    run_state_machine_as_test(machine, settings=same_each_time(25, stateful_step_count=25))
