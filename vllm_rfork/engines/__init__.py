"""Transfer engines: one small port (:mod:`.base`), one adapter file each, one table (:mod:`.table`).

Adapters take integer addresses and lengths, never tensors; they do not know each other, torch or vLLM.
"""
