"""``vllm-rfork planner`` with shorter silences on presence connections: ``quick_planner.py SECONDS OPTION ...``."""

from __future__ import annotations

import sys

from vllm_rfork.cli.main import main
from vllm_rfork.planner.http.presence import Presence

if __name__ == "__main__":
    defaults = Presence.__init__.__kwdefaults__
    assert defaults is not None
    defaults["silent_s"] = float(sys.argv.pop(1))
    sys.argv[0] = "vllm-rfork"
    sys.argv.insert(1, "planner")
    main()
