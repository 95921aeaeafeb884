"""RFork: a starting vLLM worker forks its weights out of the memory of a running peer.

Importing this package must stay free of torch and vLLM: the planner, the command line, the seed service
and the engines run where neither is installed. vLLM calls :func:`vllm_rfork.plugin.register`.
"""

__version__ = "0.1.0"
