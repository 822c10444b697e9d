"""The tensors behind the pages that the core counts."""
