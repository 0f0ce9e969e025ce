"""The kernels of a TopK training step of fixed shapes (`saelab/training/fused_step.py`): nothing in it depends on a number that
only the GPU knows, so that it can be recorded once and replayed."""
