"""Input of the compile report: every Triton kernel at the sizes of a training step, with its modelled memory traffic."""
