"""What this project relies on in vLLM and vLLM-Ascend, held against their published releases; needs no torch.

``table.py`` is the one list of it, ``source.py`` reads Python source without running it, ``releases.py`` reads single
files out of published wheels, and ``recorded/`` keeps what was found. ``python -m versions`` reads the index again.
"""
