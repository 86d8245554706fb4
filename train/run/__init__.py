"""The output of a run: workdir, checkpoints, metrics, curves and progress."""
