"""Classes of ``errors.py`` that may end a fork. Metrics count other names as ``(other)``."""

from __future__ import annotations

CAUSES = frozenset(
    {
        "SeedError",
        "EngineError",
        "EngineUnavailable",
        "VerificationError",
        "ManifestMismatch",
        "PlannerError",
        "NoSeedAvailable",
        "ConfigError",
        "ForkError",
    }
)
