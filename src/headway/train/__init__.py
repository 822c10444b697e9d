"""The lab's trainer: data, loop, checkpoints. Nothing below imports it."""
