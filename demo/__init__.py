"""`make demo`: four real vLLM servers, two of which fork their weights from a running one, and their answers compared.

It is not part of the installed package and imports nothing of it. It uses vllm-rfork as a user does: through
`vllm serve`, the planner's HTTP calls and the milestone lines in the servers' logs.
"""
