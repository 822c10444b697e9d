"""Ring 1, decides: which work runs, asked only at events. Standard library only; no clock is read here."""
