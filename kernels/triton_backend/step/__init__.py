"""The kernels of training steps of fixed shapes (`saelab/training/fused_table.py` lists them).

Nothing in them depends on a number that only the GPU knows, so that a step can be recorded once and replayed.
"""
