"""What an answer must look like: limits on what may be asked, the check of it, and what decides token by token.

No tensors, no model, no schedule. llguidance does the deciding; it is an extra, `headway[grammar]`, and is known to
`notation` and `matcher` alone, so that another decider could stand there.
"""
