"""What the compile report compiles and judges: every Triton kernel at the sizes of a training step, with its modelled traffic."""
