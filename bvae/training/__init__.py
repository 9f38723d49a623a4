"""The trainer: build a run, its step and loop, checkpoints, logs and distributed training."""
