"""Options and packages that do not enter the fingerprint, with the reason: the data file beside the fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import vllm_rfork.vllm_compat.fingerprint

_READ = json.loads((Path(vllm_rfork.vllm_compat.fingerprint.__file__).parent / "ignored.json").read_text())

#: Section → reason → fields; "vllm" is VllmConfig itself.
IGNORED_FIELDS: dict[str, dict[str, list[str]]] = _READ["fields"]
#: Reason → modules.
IGNORED_PACKAGES: dict[str, list[str]] = _READ["packages"]
