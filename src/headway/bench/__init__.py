"""Commands that print the numbers in docs/results. Nothing below imports it."""
