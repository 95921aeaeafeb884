"""Caches of compilers and profilers as plain files: their description, their validation, collection and installation.

A seed collects what its process produced (``collector.py``), and a receiver checks the description (``manifest.py``),
receives the bytes (``staging.py``), writes indexes with paths of its own (``rewriting.py``) and installs all of it
(``installer.py``). JSON caches have a schema each (``safe/``).
Everything that arrives comes from another machine. Nothing here runs or unpickles what it carries.
"""
