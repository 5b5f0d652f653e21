"""Steps inside `torch.compile` and `torch.export`: one operation, which the compiler keeps whole.

`run` is how the pure API takes any step. While a compiler traces, `trace` reads the trees in plain Python, which the
compiler follows, and calls an operation of `operations`. The operation names its chain, and the structure of the trees,
by a text from which `descriptions` makes both again, in another process too.

The whole package asks one of two questions. `torch.compiler.is_compiling()`: is a graph recorded, so that torch has to
see each operation, and a step has to become one? It is also true where `torch.export` runs Python over fake tensors
(`strict=False`). `torch.compiler.is_dynamo_compiling()`: does Dynamo interpret this very Python? It is asked before
code that Dynamo cannot follow, or must not bake into a graph: context variables, caches, the pytree library.
"""
