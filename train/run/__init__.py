"""What a run leaves: its workdir, checkpoints, numbers, curves and progress."""
