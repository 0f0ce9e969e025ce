"""The Triton path of `saelab.kernels`. Imported only by the dispatch code, and only when the Triton path is chosen.

Kernels carry `@no_type_check`: the tests check annotations by wrapping every function, and Triton must see the function
itself.
"""
