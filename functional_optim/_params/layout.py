"""`ChainLayout`: chains laid out over all parameters of an optimizer, for steps of which any have gradients."""

from collections.abc import Sequence

from .._compiler.fuse import StepCounter
from .._extras import extras_of
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
        links: list[Link] = []
        scopes: list[int] = []
        keys: list[Keys] = []
        steps = [False] * len(self.params.names)
        positions: dict[Path, int] = {}
        for t, template in enumerate(self.templates):
            if warn and len(steps) > 1:  # a parameter of its own may well be masked
                template.tx._warn(self.view)
            found = template.tx._links(self.view.narrow([k == t for k in self.params.templates]), ())
            links += found
            scopes += [positions.setdefault(link.path, len(positions)) for link in found]
            keys += [template.keys] * len(found)
            for link in found:
                if link.bound is not None and link.bound.uses_step:
                    steps = [a or b for a, b in zip(steps, link.seen, strict=True)]
        return links, scopes, keys, steps

    @property
    def is_current(self) -> bool:
        """Whether chains are known to be laid out as before: no mask or traced function could say otherwise by now."""
        asks_leaves = any(template.tx._asks_leaves() for template in self.templates)
        return not asks_leaves and all(region.is_current for region in self.traced)
