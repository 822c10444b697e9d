"""The door: HTTP in, requests out, tokens back. Carries no tensors."""
