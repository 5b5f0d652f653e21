"""The stateful layer: any chain as a `torch.optim.Optimizer`. It imports public names of the package only."""

if __name__ != "functional_optim.adapters":
    raise ImportError("import functional_optim.adapters, not adapters: a second copy of every class would be made.")
