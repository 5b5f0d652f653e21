"""`ChainLayout`: chains laid out over all parameters of an optimizer, for steps of which any have gradients."""

from collections.abc import Mapping, Sequence

from .._compiler.fuse import StepCounter
from .._extras import extras_of
from .._opaque import SplitState
from .._regions import Region, can_fuse, cut_into_regions
from .._transform import Link, Path
from .template import Keys, ParamList, Template, view_of


class ChainLayout:
    """The regions of some chains over all parameters, with their programs: whichever of these take part in a step.

    Args:
      templates: the chains.
      params: the parameters.
      guarded: whether a step is taken only if `found_inf` is 0.
      warn: whether to warn of masks that match nothing.

    Attributes:
      view: the parameters as the tree that masks are asked about.
      traced: the regions with functions that have been traced, and refer to something that may change.
      keys: for each transformation, the keys of its slots.
      prefixes: for each transformation that is not made of rules, by position, the beginning of its keys.
      segments: the regions, and the transformations between them.
      spans_tree: whether something is reduced over all parameters.
      reduces: whether something is reduced over a parameter, or over all.
      extras: the extra arguments that are taken.

    Raises:
      TypeError, ValueError: the chains do not fit the parameters, or each other.
    """

    def __init__(self, templates: Sequence[Template], params: ParamList, guarded: bool, warn: bool) -> None:
        self.templates, self.params, self.guarded = tuple(templates), params, guarded
        self.view = view_of(params.names, params.tensors)
        self.prefixes: dict[int, str] = {}
        links, scopes, self.keys, steps = self._links(warn)
        counting = [StepCounter(advance, guarded) for advance in steps]
        self.segments = cut_into_regions(links, True, len(params.names), scopes, counting)
        regions = [segment for segment in self.segments if isinstance(segment, Region)]
        self.traced = [region for region in regions if region.traced]
        self.spans_tree = any(region.spans_tree for region in regions)
        self.reduces = any(recipe.program.reductions for region in regions for recipe in region.recipes.values())
        self.extras = extras_of(self.segments)

    def _links(self, warn: bool) -> tuple[list[Link], list[int], list[Keys], list[bool]]:
        """The transformations of all templates, their scopes, the keys of each, and which parameters count steps."""
        steps = [False] * len(self.params.names)
        found: list[list[Link]] = []
        for t, template in enumerate(self.templates):
            if warn and len(steps) > 1:  # a parameter of its own may well be masked
                template.tx._warn(self.view)
            found.append(template.tx._links(self.view.narrow([k == t for k in self.params.templates]), ()))
        merged = _merged(found)
        positions: dict[Path, int] = {}
        for k, (link, t) in enumerate(merged):
            if link.bound is None:
                self.prefixes[k] = self.templates[t].prefixes[link.path]
            elif link.bound.uses_step:
                steps = [a or b for a, b in zip(steps, link.seen, strict=True)]
        links = [link for link, _ in merged]
        scopes = [positions.setdefault(link.path, len(positions)) for link in links]
        return links, scopes, [self.templates[t].keys for _, t in merged], steps

    def split_states(self) -> dict[int, SplitState]:
        """The states of transformations that are not made of rules, by position.

        Raises:
          TypeError, ValueError: one of them cannot be split among the parameters.
        """
        opaque = [segment for segment in self.segments if not isinstance(segment, Region)]
        later = self.params.later
        return {x.position: SplitState(x.link, self.prefixes[x.position], self.view, later) for x in opaque}

    @property
    def is_current(self) -> bool:
        """Whether chains are known to be laid out as before: no mask or traced function could say otherwise by now."""
        asks_leaves = any(template.tx._asks_leaves() for template in self.templates)
        return not asks_leaves and all(region.is_current for region in self.traced)


def _merged(chains: Sequence[Sequence[Link]]) -> list[tuple[Link, int]]:
    """The links of several chains in one order, each with the position of its chain.

    Links that chains have at one path stand side by side, so that reductions over the tree meet in one region. A
    transformation that is not made of rules is one link there, which sees the leaves of all: it is called once a step.
    """
    joints: list[dict[int, int]] = []  # for each path, the position of the link in the chains that have it
    for t, links in enumerate(chains):
        at = 0
        for i, link in enumerate(links):
            found = next((k for k in range(at, len(joints)) if _is_same(link, chains, joints[k])), None)
            if found is None:
                joints.insert(at, {})
            at = at if found is None else found
            joints[at][t] = i
            at += 1
    merged: list[tuple[Link, int]] = []
    places: dict[tuple[int, int], tuple[int, int]] = {}  # of links: the first one at the path, and its own
    for joint in joints:
        start, own = len(merged), [chains[t][i] for t, i in joint.items()]
        if own[0].bound is None:
            seen = tuple(map(any, zip(*[link.seen for link in own], strict=True)))
            merged.append((own[0]._replace(seen=seen), next(iter(joint))))
            places |= dict.fromkeys(joint.items(), (start, start))
            continue
        for (t, i), link in zip(joint.items(), own, strict=True):
            places[t, i] = start, len(merged)
            if link.wraps is not None:
                # all that are at the path of the first one it wraps are computed together, where kernels are cut
                whole = not all(map(can_fuse, chains[t][i - link.wraps : i]))
                first, mine = places[t, i - link.wraps]
                link = link._replace(wraps=len(merged) - (first if whole else mine))
            merged.append((link, t))
    return merged


def _is_same(link: Link, chains: Sequence[Sequence[Link]], joint: Mapping[int, int]) -> bool:
    """Whether a link has the path of others, which stand at some positions of chains, and is called with them or not.

    A transformation that is not made of rules is the same object for all groups.
    """
    other = next(chains[t][i] for t, i in joint.items())
    is_rule = link.bound is not None and other.bound is not None
    return link.path == other.path and (is_rule or link.tx is other.tx)
