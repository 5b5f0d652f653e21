"""Reasons why a compiled step is not donated, for those who trace it and for its operation."""

INSIDE = (
    "donate=True writes in place, which a torch.func transformation cannot follow; use donate=False inside of it, or "
    "take the step outside."
)
RECORDED = (
    "a parameter, an update, a state or a hyper-parameter requires a gradient, and donate=True would write in place "
    "while autograd is recording; wrap the step in `torch.no_grad()`, or use donate=False to differentiate through it."
)
