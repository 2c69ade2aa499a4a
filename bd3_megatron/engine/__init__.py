"""Engine: one optimizer step, whatever the grid. Nothing else calls deepspeed.initialize."""
