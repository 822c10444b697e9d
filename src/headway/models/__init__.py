"""Models as plain functions of their arguments: weights and tensors in, tensors out."""
