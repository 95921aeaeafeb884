"""Bounds of everything about caches that comes from another machine or from a directory that others may write to."""

from __future__ import annotations

#: Files of one artifact. Inductor writes a few hundred for one model, FlashInfer's compiler about ten for one kernel.
MAX_FILES = 8_192
MAX_FILE_NBYTES = 256 * 1024 * 1024
MAX_ARTIFACT_NBYTES = 512 * 1024 * 1024
#: Artifacts of one seed, and their bytes in all.
MAX_ARTIFACTS = 64
MAX_OFFER_NBYTES = 2 * 1024 * 1024 * 1024
#: Files of all artifacts of one seed.
MAX_OFFER_FILES = 16_384
#: The description of all artifacts on the wire: about 200 bytes for a file.
MAX_MANIFEST_NBYTES = 8 * 1024 * 1024

#: Directories above a file, inside its artifact.
MAX_DEPTH = 12
#: Characters of one part of a path, which are ASCII, and of a whole path.
MAX_PART = 200
MAX_PATH = 800

#: Facts of which an artifact's identity consists, and characters of a fact's name and value.
MAX_FACTS = 256
#: Facts that only explain a difference, for all artifacts of a seed.
MAX_DETAILS = 2_000
MAX_FACT_NAME = 160
MAX_FACT_VALUE = 200
#: Longest time in seconds that a seed may state for producing an artifact.
MAX_SECONDS = 86_400.0

#: Bytes that are read, hashed and written in one piece.
PIECE_NBYTES = 1024 * 1024
#: Names in one directory tree that a collector looks at, those that it leaves out included.
MAX_ENTRIES = 4 * MAX_FILES
