"""`ChainLayout`: chains laid out over all parameters of an optimizer, for steps of which any have gradients."""

from collections.abc import Mapping, Sequence

from .._compiler.fuse import StepCounter
from .._extras import extras_of
from .._opaque import SplitState
from .._regions import Region, cut_into_regions
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
        return {x.position: SplitState(x.link, self.prefixes[x.position], self.view) for x in opaque}

    @property
    def is_current(self) -> bool:
        """Whether chains are known to be laid out as before: no mask or traced function could say otherwise by now."""
        asks_leaves = any(template.tx._asks_leaves() for template in self.templates)
        return not asks_leaves and all(region.is_current for region in self.traced)


def _merged(chains: Sequence[Sequence[Link]]) -> list[tuple[Link, int]]:
    """The links of several chains in one order, each with the position of its chain.

    A transformation that is not made of rules, and that several chains have at one path, is one link, which sees the
    leaves of all: it is called once a step. All in front of it in any chain stays in front of it.
    """
    joints: list[dict[int, int]] = []  # for each such transformation, its position in the chains that have it
    for t, links in enumerate(chains):
        at = 0
        for i, link in enumerate(links):
            if link.bound is None:
                same = (k for k in range(at, len(joints)) if _is_same(link, chains, joints[k]))
                k = next(same, None)
                if k is None:
                    joints.insert(at, {})
                    k = at
                joints[k][t] = i
                at = k + 1
    merged: list[tuple[Link, int]] = []
    taken = [0] * len(chains)
    places: dict[tuple[int, int], int] = {}  # of links, by chain and position there
    for joint in [*joints, {t: len(links) for t, links in enumerate(chains)}]:
        for t, end in joint.items():
            for i in range(taken[t], end):
                link, places[t, i] = chains[t][i], len(merged)
                if link.wraps is not None:  # others may stand between those that it wraps
                    link = link._replace(wraps=len(merged) - places[t, i - link.wraps])
                merged.append((link, t))
            taken[t] = end + 1
        own = [chains[t][i] for t, i in joint.items() if i < len(chains[t])]
        if own:
            places |= {(t, i): len(merged) for t, i in joint.items()}
            seen = tuple(map(any, zip(*[link.seen for link in own], strict=True)))
            merged.append((own[0]._replace(seen=seen), next(iter(joint))))
    return merged


def _is_same(link: Link, chains: Sequence[Sequence[Link]], joint: Mapping[int, int]) -> bool:
    """Whether a link is the transformation of others, which stand at some positions of chains."""
    other = next(chains[t][i] for t, i in joint.items())
    return link.tx is other.tx and link.path == other.path
