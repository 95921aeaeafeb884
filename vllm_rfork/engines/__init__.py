"""Transfer engines: one port (:mod:`.base`), one registry (:mod:`.registry`), one package for each adapter.

Adapters take integer addresses and lengths, never tensors.
"""
