"""What a run is made of: settings, steps, checkpoints, scores, devices, the console."""
