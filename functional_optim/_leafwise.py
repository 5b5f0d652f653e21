"""Rules for whole tensors: torch operations compute them, for all leaves of one shape at once where that can be."""

import functools
import itertools
import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from ._compiler.errors import RuleError, note_number
from ._compiler.rule import Bound, Option, Rule
from ._regions import LeafwiseRegion
from ._runtime.allocate import unbind_copies
from ._runtime.checks import at, check_memory, find_freed, refuse_freed, schedule_value
from ._runtime.cuda.capture import NumberWatch, is_capturing, refuse_counter, refuse_host_schedule
from ._runtime.groups import Columns, Key
from ._runtime.internals import needs_dispatch, version
from ._runtime.numbers import number_of
from ._runtime.pointers import PointerReader
from ._runtime.spec import PLAIN, TensorSpec, sizes_of


STACK = 1 << 20  # the most elements of leaves that are computed together on a CPU, so that they stay in its cache
_LOOK = attrgetter("dtype", "device", "requires_grad")
_REQUIRES_GRAD, _IS_CPU = attrgetter("requires_grad"), attrgetter("is_cpu")
_ARGUMENTS = frozenset((*PLAIN, type(None)))
_Token = tuple[int, Any, bool | None]  # an owner of options, the number of steps or its tensor, and `first`


class LeafwiseStep:
    """A rule for whole tensors over the leaves of a tree.

    Args:
      region: the rule.
      paths: the path of each leaf.
      present: the leaves that take part.
      params: tensors of the shapes of the leaves, where these are computed in another form than they are stored in.
    """

    def __init__(
        self,
        region: LeafwiseRegion,
        paths: Sequence[str],
        present: Sequence[int],
        params: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.region, self.paths, self.params, self.bound = region, paths, params, region.bound
        self.leaves = [i for i in present if region.link.seen[i]]
        rule, position = region.bound.rule, region.position
        self.slots: list[Key] = [(position, name) for name in rule.slots]
        self.keys: list[Key] = ["updates", *(["params"] if rule.uses_params else []), *self.slots]
        # the specs of the last step's tensors, and for each leaf, the number that those alike share
        self.known: tuple[PointerReader | None, list[int]] = (None, [])
        self.batched = True  # until the rule turns out to be one that cannot be
        self.watch = NumberWatch()
        self.checked = False  # whether it has been seen to leave its arguments alone

    def compute(
        self,
        columns: Columns,
        extra: Mapping[str, Any],
        options: Sequence[Mapping[str, Any]] = ({},),
        owners: Sequence[int] | None = None,
        first: frozenset[int] | None = None,
        kinds: Sequence[int] | None = None,
    ) -> Columns:
        """New updates and slots. Nothing is written.

        Args:
          columns: the tensors that the rule reads.
          extra: the extra arguments.
          options: mappings that hyper-parameters are looked up in.
          owners: whose options each leaf looks up; None if all look up the first.
          first: the leaves that take their first step; None where a counter tells.
          kinds: those that `known_kinds` has found for the tensors, if any.

        Returns:
          The columns that change, complete.

        Raises:
          RuleError: the rule returned something else than an update and slots, or changed an argument.
          ValueError: a slot has another shape than the rule declares.
        """
        results: dict[Key, list[Any]] = {key: list(columns[key]) for key in ("updates", *self.slots)}
        arrays = self._arrays(columns)
        if kinds is None:
            kinds = self._kinds_of(arrays, self.params or columns["params" if "params" in columns else "updates"])
        alike = None if owners is None else self._with_like_options(options, owners)
        tokens, meant = self._tokens(columns.get(self.region.counter), alike, first if self.slots else None)
        values: dict[tuple[_Token, torch.device], _Values] = {}
        batches: dict[tuple[_Token, int], list[int]] = {}
        for k, key in enumerate(zip(tokens, kinds, strict=True)):
            batches.setdefault(key, []).append(k)
        devices = {key: columns["updates"][self.leaves[batch[0]]].device for key, batch in batches.items()}
        if not needs_dispatch():
            self._refuse_capture(columns, {*devices.values()})
        for key, device in devices.items():
            owner, count, is_first = meant[key[0]]
            if (key[0], device) not in values:
                values[key[0], device] = _Values.of(self.region, options, owner, count, is_first, extra, device)
        if not needs_dispatch():
            self.watch.check([x for own in values.values() for x in own.hypers(self.bound)], {*devices.values()})
        for (token, kind), batch in batches.items():
            paths = [self.paths[self.leaves[k]] for k in batch]
            call = _Call(self.bound.rule, values[token, devices[token, kind]], paths[0])
            own = arrays if len(batches) == 1 else [[column[k] for k in batch] for column in arrays]
            outputs = self._run(call, paths, own)
            for result, column in zip(results.values(), outputs, strict=True):
                for k, x in zip(batch, column, strict=True):
                    if x is not None:
                        result[self.leaves[k]] = x
        self.checked = True
        return dict(results)

    def _refuse_capture(self, columns: Columns, devices: set[torch.device]) -> None:
        """Refuses, while a stream is capturing, hyper-parameters that Python computes from the number of steps.

        Raises:
          CaptureError: a graph would keep it.
        """
        if not is_capturing(devices):
            return
        for name in self.region.by_python:
            refuse_host_schedule(name, devices)
        counters = columns[self.region.counter] if self.bound.uses_step else ()
        for i in self.leaves if counters else ():
            count, device = counters[i], columns["updates"][i].device
            if not isinstance(count, torch.Tensor) or count.device != device:
                refuse_counter(f"the counter of {self.bound.rule.name}{at(self.paths[i])}", count, device)

    def _with_like_options(self, options: Sequence[Mapping[str, Any]], owners: Sequence[int]) -> list[int]:
        """The owner of each leaf, or the first one with the same numbers for this rule: such leaves go together."""
        own = {f"{self.bound.rule.name}.{k}": x for k, x in self.bound.values.items() if isinstance(x, Option)}
        firsts: dict[Hashable, int] = {}
        alike = {}
        for owner in dict.fromkeys(owners):
            values = [option.look_up(options[owner], label) for label, option in own.items()]
            key = tuple((type(x), x) if isinstance(x, (int, float)) else id(x) for x in values)
            alike[owner] = firsts.setdefault(key, owner)
        return [alike[owner] for owner in owners]

    def _tokens(
        self, counter: Sequence[Any] | None, owners: Sequence[int] | None, first: frozenset[int] | None
    ) -> tuple[list[_Token], dict[_Token, tuple[int, Any, Any]]]:
        """A token for each leaf, and of each token whose options it is, its steps so far, and whether it is the first.

        Leaves of one token are given the same keyword arguments.
        """
        n = len(self.leaves)
        column = [None] * n if counter is None else [counter[i] for i in self.leaves]
        ids = list(map(id, column))
        counts: dict[int, Any] = dict(zip(ids, column, strict=True))  # counters that are shared once
        if not needs_dispatch() and _are_on_cpu(counts.values()):
            # Python's numbers where that costs nothing: on the CPU, outside of transformations
            counts = dict(zip(counts, map(torch.Tensor.item, counts.values()), strict=True))
        names = {key: key if isinstance(x, torch.Tensor) else x for key, x in counts.items()}
        by_name = {names[key]: x for key, x in reversed(counts.items())}  # the first one of equal numbers
        own = [0] * n if owners is None else [owners[i] for i in self.leaves]
        firsts = [None] * n if first is None else [i in first for i in self.leaves]
        tokens = list(zip(own, map(names.__getitem__, ids), firsts, strict=True))
        meant: dict[_Token, tuple[int, Any, Any]] = {}
        for owner, name, is_first in dict.fromkeys(tokens):
            count = by_name[name]
            meant[owner, name, is_first] = owner, count, count == 0 if is_first is None else is_first
        return tokens, meant

    def _kinds_of(self, arrays: Sequence[Sequence[Any]], like: Sequence[torch.Tensor]) -> list[int]:
        """For each leaf, a number that leaves of the same shapes, dtypes and devices share.

        Raises:
          ValueError: a slot does not go with its leaf, or a tensor has no memory.
        """
        known = self._known_kinds(arrays)
        if known is not None:
            return known
        self._check_memory(arrays)
        for k, i in enumerate(self.leaves):
            self._check_slots([column[k] for column in arrays], self.paths[i], like[i])
        numbers: dict[Hashable, int] = {}
        looks = [[None if x is None else (sizes_of(x), _LOOK(x)) for x in column] for column in arrays]
        kinds = [numbers.setdefault(look, len(numbers)) for look in zip(*looks, strict=True)]
        tensors = [x for column in arrays for x in column if x is not None]
        plain = not needs_dispatch() and not any(map(_REQUIRES_GRAD, tensors))
        reader = PointerReader(tensors, [TensorSpec.of(x) for x in tensors]) if plain else None
        self.known = reader, kinds  # at once: several threads may step
        return kinds

    def known_kinds(self, columns: Columns) -> list[int] | None:
        """The kinds of leaves if all tensors have the specs of the last step's, so that they need not be checked again.

        Args:
          columns: the tensors that the rule reads, and perhaps others.
        """
        return self._known_kinds(self._arrays(columns))

    def _known_kinds(self, arrays: Sequence[Sequence[Any]]) -> list[int] | None:
        """The kinds of leaves, see `_kinds_of`, if tensors have the specs of the last step's."""
        reader, kinds = self.known  # at once: another thread may step
        if reader is None or needs_dispatch():
            return None
        tensors = [x for column in arrays for x in column if x is not None]
        if len(tensors) != len(reader.specs) or not reader.fits(tensors):
            return None
        return None if torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors)) else kinds

    def _arrays(self, columns: Columns) -> list[list[torch.Tensor | None]]:
        """The arguments of the rule for each leaf; None where it has none, for which trees have an empty node."""
        chosen = [[columns[key][i] for i in self.leaves] for key in self.keys]
        return [x if _ARGUMENTS.issuperset(map(type, x)) else list(map(_tensor_or_none, x)) for x in chosen]

    def _check_slots(self, arrays: Sequence[Any], path: str, p: torch.Tensor) -> None:
        """Refuses slots that do not go with their leaf."""
        rule = self.bound.rule
        for (name, slot), x in zip(rule.slots.items(), arrays[len(arrays) - len(rule.slots) :], strict=True):
            shape = slot.shape_for(p, self.bound.values)
            if shape is None and x is None:
                continue
            if not isinstance(x, torch.Tensor) or shape is None or tuple(x.shape) != shape or x.device != p.device:
                found = f"{tuple(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else repr(x)
                raise ValueError(
                    f"state {rule.name}.{name}{at(path)} is {found}, but the rule declares "
                    f"{f'a tensor of shape {shape} on {p.device}' if shape is not None else 'no entry'} for a leaf of "
                    f"shape {tuple(p.shape)}."
                )

    def _check_memory(self, arrays: Sequence[Sequence[Any]]) -> None:
        """Refuses tensors without memory, which operations of torch would read.

        Raises:
          ValueError: the storage of a tensor has been freed or cut.
        """
        found = find_freed(dict(zip(self.keys, arrays, strict=True)))
        if found is not None:
            key, k = found
            name = key if isinstance(key, str) else f"state {self.bound.rule.name}.{key[1]}"
            refuse_freed(name, self.paths[self.leaves[k]], arrays[0][k].shape)

    def _run(self, call: "_Call", paths: Sequence[str], arrays: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
        """Columns of results for columns of arguments, of leaves that are alike, at some paths."""
        n, room = len(arrays[0]), self._room(call.rule, arrays[0][0])
        if n > room:
            cuts = [slice(k, k + room) for k in range(0, n, room)]
            stacks = [
                self._run(call._replace(path=paths[cut.start]), paths[cut], [column[cut] for column in arrays])
                for cut in cuts
            ]
            return [list(itertools.chain.from_iterable(column)) for column in zip(*stacks, strict=True)]
        if self.batched and (n > 1 or call.rule.batched):
            # copies, so that a rule which writes to its arguments is refused before it has changed anything; a view
            # will do for the updates of a rule that has been seen not to
            whole = _whole(arrays[0]) if self.checked and (n == 1 or self.region.position) else None
            viewed = whole is not None
            stacked = [None if column[0] is None else torch.stack(list(column)) for column in arrays[viewed:]]
            stacked = [whole, *stacked] if viewed else stacked
            before = [version(x) for x in stacked]
            try:
                results = call(*stacked) if call.rule.batched else call.mapped(stacked)
            except (RuleError, torch.OutOfMemoryError):
                raise
            except RuntimeError:  # of torch.func.vmap, which cannot follow some operations; or one of the rule's own
                if call.rule.batched:
                    raise
            else:
                self._refuse_changes(call, stacked, before)
                # slots have memory of their own: views of one buffer would keep all of it alive
                slots = [[None] * n if x is None else _copies(x) for x in results[1:]]
                update = _apart(results[0], arrays[0][0]) if viewed else results[0]
                return [update.unbind(0), *slots]
            # an error of the rule's own is raised anew here, with the leaf it is of
            results = self._one_by_one(call, paths, arrays)
            self.batched = False
            return results
        return self._one_by_one(call, paths, arrays)

    @staticmethod
    def _room(rule: Rule, leaf: torch.Tensor) -> int:
        """The number of leaves like one that are computed together."""
        if rule.stacked_up_to is not None and leaf.numel() > rule.stacked_up_to:
            return 1
        return max(1, STACK // max(1, leaf.numel())) if leaf.device.type == "cpu" else sys.maxsize

    def _one_by_one(self, call: "_Call", paths: Sequence[str], arrays: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
        """Columns of results for columns of arguments, from a call for each leaf."""
        columns = []
        for path, leaf in zip(paths, zip(*arrays, strict=True), strict=True):
            own = [x.clone() if x is not None and (k or not self.checked) else x for k, x in enumerate(leaf)]
            before = [version(x) for x in own]
            update, *slots = call._replace(path=path)(*own)
            self._refuse_changes(call, own, before)
            # a slot may be the gradient, another slot, a view of one, or the update itself
            old, first = leaf[len(leaf) - len(slots) :], len(own) - len(slots)
            kept = [
                y if x is None or x is own[first + k] else x.clone()
                for k, (x, y) in enumerate(zip(slots, old, strict=True))
            ]
            columns.append([_apart(update, leaf[0]), *kept])
        return list(zip(*columns, strict=True))

    def _refuse_changes(self, call: "_Call", arrays: Sequence[Any], before: Sequence[int]) -> None:
        """Refuses a rule that writes to its arguments."""
        names = ["u", *(["p"] if call.rule.uses_params else []), *call.rule.slots]
        for name, x, old in zip(names, arrays, before, strict=True):
            if version(x) != old:
                raise RuleError(
                    f"{call.rule.name} changes its argument `{name}` in place; make a new tensor of it, as in "
                    f"`{name} = {name} * 2` in place of `{name}.mul_(2)`."
                )


def _tensor_or_none(x: Any) -> torch.Tensor | None:
    return x if isinstance(x, torch.Tensor) else None


def _are_on_cpu(counts: Collection[Any]) -> bool:
    """Whether all counters are tensors on the CPU."""
    return all(isinstance(x, torch.Tensor) for x in counts) and all(map(_IS_CPU, counts))


def _whole(leaves: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The stack of leaves as a view of the memory that they have one after the other; None if they have not.

    So have the updates of a rule for whole tensors before this one, which are views of its results.
    """
    x, n = leaves[0], len(leaves)
    if x.is_inference():  # has no version, by which a rule that writes to it would be found out
        return None
    if n == 1:
        return x.unsqueeze(0)
    if needs_dispatch() or any(y.requires_grad or y.is_neg() or y.is_conj() for y in leaves):
        return None
    size, memory = x.numel(), x.untyped_storage().data_ptr()
    if (x.storage_offset() + n * size) * x.element_size() > x.untyped_storage().nbytes():
        return None  # several storages at one address
    for k, y in enumerate(leaves):
        expected = x.stride(), memory, x.storage_offset() + k * size
        if (y.stride(), y.untyped_storage().data_ptr(), y.storage_offset()) != expected:
            return None
    return x.as_strided((n, *x.shape), (size, *x.stride()))


def _copies(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """The leaves of a stack, each in memory of its own."""
    if needs_dispatch():  # `vmap` cannot follow the other
        return [leaf.clone() for leaf in x.unbind(0)]
    return unbind_copies(x)


def _in_one_dtype(arrays: Sequence[Any], own: Sequence[bool]) -> list[Any]:
    """Floating tensors in the widest dtype of them all, because operations of torch take few dtypes together.

    Args:
      arrays: tensors, of which None and those of other dtypes stay as they are.
      own: for each, whether it keeps a dtype of its own.
    """
    takes = [x is not None and x.is_floating_point() and not apart for x, apart in zip(arrays, own, strict=True)]
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in itertools.compress(arrays, takes)))
    return [x.to(dtype) if take else x for x, take in zip(arrays, takes, strict=True)]


def _apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A tensor, or a copy of it if it is another one, or a view of that."""
    same = x is y or (not needs_dispatch() and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr())
    return x.clone() if same else x


class _Values(NamedTuple):
    """The keyword arguments of a rule at this step."""

    keywords: Mapping[str, Any]
    first: Any

    @classmethod
    def of(
        cls,
        region: LeafwiseRegion,
        options: Sequence[Mapping[str, Any]],
        owner: int,
        count: Any,
        first: Any,
        extra: Mapping[str, Any],
        device: torch.device,
    ) -> "_Values":
        """The arguments of leaves on one device that share options and a counter.

        Args:
          region: the rule.
          options: mappings that hyper-parameters are looked up in.
          owner: the position of theirs.
          count: the number of steps taken so far, if it matters.
          first: whether this is the first step.
          extra: the extra arguments.
          device: the device.
        """
        bound, rule, keywords = region.bound, region.bound.rule, {}
        for name, value in bound.values.items():
            if isinstance(value, Option):
                keywords[name] = number_of(value, options, owner, f"{rule.name}.{name}")
            elif bound.is_schedule(name):
                given = count
                if isinstance(count, float) or (name in region.python_hypers and not needs_dispatch()):
                    on_meta = isinstance(count, torch.Tensor) and count.is_meta
                    given = 0 if on_meta else int(count)  # waits for a device
                keywords[name] = schedule_value(f"{rule.name}.{name}", value(given))
            else:
                keywords[name] = value
        for name in rule.extras:
            keywords[name] = extra[name]
        for name, value in keywords.items():
            check_memory(f"the hyper-parameter {rule.name}.{name} is", value, device)
        if not isinstance(first, torch.Tensor):  # written there: a copy would wait for the device
            first = torch.full((), bool(first), device=device)
        if rule.uses_step:
            of = count if isinstance(count, torch.Tensor) else torch.tensor(count, dtype=torch.float64, device="cpu")
            keywords["step"] = of.to(torch.float64) + 1
        if rule.takes_first:
            keywords["first"] = first
        return cls(keywords, first)

    def hypers(self, bound: Bound) -> list[Any]:
        """The hyper-parameters and extra arguments."""
        return [self.keywords[name] for name in (*bound.values, *bound.rule.extras)]


class _Call(NamedTuple):
    """Calls of a rule with the hyper-parameters of some leaves.

    Args:
      rule: the rule.
      values: its keyword arguments.
      path: the path of the leaf, or of the first of several, for messages.
    """

    rule: Rule
    values: _Values
    path: str

    def __call__(self, *arrays: Any) -> list[Any]:
        """The new update, and the new value of each slot."""
        rule, u = self.rule, arrays[0]
        slots = list(arrays[len(arrays) - len(rule.slots) :])
        starts = [slot.start == "first_update" for slot in rule.slots.values()]
        before = [
            torch.where(self.values.first.to(u.device), u, x) if start else x
            for start, x in zip(starts, slots, strict=True)
        ]
        params = [arrays[1]] if rule.uses_params else []
        hypers = self.values.keywords
        own = [slot.per_leaf or slot.declared_dtype(hypers) is not None for slot in rule.slots.values()]
        given = _in_one_dtype([u, *params, *before], [False] * (1 + len(params)) + own)
        try:
            result = rule.fn(*given, **self.values.keywords)
        except Exception as error:
            note_number(error, "`torch.log(torch.as_tensor(b, dtype=torch.float64))`")
            # a rule that is declared as batched is given stacks
            shape, more = (u.shape[1:], len(u) - 1) if rule.batched else (u.shape, 0)
            others = f" and {more} more of that shape" if more else ""
            error.add_note(f"in {rule.name}, for a tensor of shape {tuple(shape)}{at(self.path)}{others}")
            raise
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if len(results) != 1 + len(slots):
            expected = ", ".join(["u", *rule.slots])
            raise RuleError(f"{rule.name} returned {len(results)} results, expected {1 + len(slots)}: ({expected}).")
        self._check("u", results[0], u)
        results[0] = results[0].to(u.dtype)
        for k, (name, x) in enumerate(zip(rule.slots, slots, strict=True), 1):
            if x is None:
                if results[k] is not None:
                    raise RuleError(
                        f"{rule.name} returned a value for `{name}`{at(self.path)}, which has no entry there."
                    )
                continue
            self._check(name, results[k], x)
            # one that is returned as it was given is not rounded twice
            results[k] = (before[k - 1] if results[k] is given[k - 1 - len(slots)] else results[k]).to(x.dtype)
        return results

    def mapped(self, stacked: Sequence[Any]) -> list[Any]:
        """The same for stacked leaves, by `torch.func.vmap`."""
        kept: list[bool] = []

        def call(*arrays: Any) -> tuple[Any, ...]:
            results = self(*arrays)
            kept[:] = [x is not None for x in results]
            return tuple(x for x in results if x is not None)

        in_dims = tuple(None if x is None else 0 for x in stacked)
        results = iter(torch.func.vmap(call, in_dims=in_dims, randomness="different")(*stacked))
        return [next(results) if there else None for there in kept]

    def _check(self, name: str, x: Any, like: torch.Tensor) -> None:
        """Refuses a result that has not the shape and the kind of dtype of the tensor that it replaces."""
        where = f"{self.rule.name} returned for `{name}`{at(self.path)}"
        if not isinstance(x, torch.Tensor):
            raise RuleError(f"{where} {x!r:.60}, expected a tensor of shape {tuple(like.shape)}.")
        if x.is_nested or x.layout is not torch.strided:
            kind = "a nested tensor" if x.is_nested else f"a tensor of the layout {x.layout}"
            raise RuleError(f"{where} {kind}, expected a dense one; convert it, with `.to_dense()` if it is sparse.")
        if x.shape != like.shape:
            raise RuleError(f"{where} a tensor of shape {tuple(x.shape)}, expected {tuple(like.shape)}.")
        if x.device != like.device:
            raise RuleError(f"{where} a tensor on {x.device}, expected one on {like.device}.")
        if (x.is_complex(), x.is_floating_point()) != (like.is_complex(), like.is_floating_point()):
            raise RuleError(f"{where} {x.dtype}, expected {like.dtype}; convert it, with `.to({like.dtype})`.")
