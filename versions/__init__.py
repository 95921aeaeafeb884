"""The interfaces of vLLM and vLLM-Ascend that this project relies on, checked against their published releases.

``table.py`` lists them, ``source.py`` reads Python source without running it, ``releases.py`` reads single files out of
published wheels, and ``recorded/`` contains the results. ``python -m versions`` reads the index again. Needs no torch.
"""
