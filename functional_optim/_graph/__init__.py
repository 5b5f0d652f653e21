"""Steps inside `torch.compile` and `torch.export`: one operation, which the compiler keeps whole.

`run` is how the pure API takes any step. While a compiler traces, `trace` reads the trees in plain Python, which the
compiler follows, and calls an operation of `operations`. The operation names its chain, and the structure of the trees,
by a text from which `descriptions` makes both again, in another process too.
"""
