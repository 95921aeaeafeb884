"""Everything that depends on vLLM's and vLLM-Ascend's internals, and nothing else.

Every private attribute and every difference between versions is named in this package, so that a new vLLM release is
read against one folder. The repository's ``versions/table.py`` lists what is relied on, for the check against published
releases.
"""
