"""Engine: one optimizer step, whatever the grid. The only room that calls deepspeed.initialize."""
