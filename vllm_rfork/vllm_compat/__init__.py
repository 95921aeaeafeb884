"""Everything that depends on vLLM's and vLLM-Ascend's internals.

Their names (modules, classes, attributes) occur only here, in ``loader.py`` and in ``plugin.py``; a test checks it. A
new release of theirs is read against this package. The repository's ``versions/table.py`` lists the interfaces that it
relies on, for the check against published releases.
"""
