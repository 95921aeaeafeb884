"""The terminal's small commands: ``seeds``, ``leases``, ``key`` and ``doctor``.

Each is a module that ``cli.py`` imports when its command runs. Must not import torch, vLLM or the planner's side: what
the planner knows is asked over HTTP, of whichever planner answers.
"""
