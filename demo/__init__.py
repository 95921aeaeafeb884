"""`make demo`: four real vLLM servers, of which two fork their weights from a running one, and a proof that all agree.

Nothing in here is part of the installed package; nothing of the package is imported. The demo meets vllm-rfork as
a user does: through `vllm serve`, the planner's HTTP and the milestone lines in the servers' logs.
"""
