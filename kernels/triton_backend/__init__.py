"""The Triton backend of `saelab.kernels`. `kernels/dispatch.py` imports it only when it is chosen.

Kernels carry `@no_type_check` because the tests check annotations by wrapping every function, and Triton needs the
unwrapped one.
"""
