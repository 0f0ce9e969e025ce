"""The Triton kernels. Imported lazily, by dispatch code only; nothing outside this folder imports triton.

Kernels carry `@no_type_check`: the tests check annotations at run time by wrapping every function, and Triton reads a
kernel through its source and its globals, which a wrapper hides.
"""
