"""A model case of the zoo: how its checkpoint is made, how it is prompted, and the expected outcome. Plain data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from zoo.workers import GENERATE

#: Settings that are widths, by the names that architectures use for them: what ``scaled`` multiplies.
WIDTHS = frozenset(
    {
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "ffn_dim",
        "word_embed_proj_dim",
        "n_embd",
        "n_head",
        "q_lora_rank",
    }
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: selected by ``--only``, and part of the seed key.
        covers: the reason for the row, in a few words.
        model_class: the transformers class that makes the weights.
        settings: its configuration, without what ``COMMON`` gives.
        finish: names of steps in ``checkpoints.STEPS`` that turn the saved model into what is loaded, in order.
        config_changes: additions to config.json; mappings are merged.
        engine_arguments: vLLM's, in addition to the common ones. ``{folder}`` in a text is the model's folder.
        asks: see ``workers.Order``.
        adapter: also answer prompts with a LoRA adapter.
        media: ``image`` or ``audio``: one more prompt has one, at the position of the token ``media_token``.
        models: how many models one worker loads: 2 with a draft.
        ranks: workers of one instance; tensor-parallel, unless ``engine_arguments`` say pipeline_parallel_size or
            data_parallel_size. Of a dense model with replicas, as many as those.
        replicas: data parallel engines of a dense model, which vLLM makes independent of each other: each may fork
            from any seed.
        executor: vLLM's own executor starts the workers, on as many nodes as ``engine_arguments`` say (nnodes), each a
            process of this host; else every worker is launched by itself, as torchrun does.
        needs_files: why even a fork needs the weight files; empty if it does not.
        not_in_checkpoint: class of the model and name of each tensor that no checkpoint gives a value, since something
            replaces it later; what they are as loaded is not held against the default load, only against the seed.
        refused: why the fork must be refused; a part of the expected log line.
        cannot_run: a part of vLLM's own error if it cannot load this at all.
        cannot_answer: why vLLM can load but not run this; it is then only loaded and compared.
        why: an explanation of such an entry.

    ``refused``, ``cannot_run`` and ``cannot_answer`` are by trait of the platform, see ``processes.platform_facts``;
    ``any`` applies everywhere.
    """

    name: str
    covers: str
    model_class: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    finish: tuple[str, ...] = ()
    config_changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    engine_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    asks: str = GENERATE
    adapter: bool = False
    media: str = ""
    media_token: int = 0
    models: int = 1
    ranks: int = 1
    replicas: int = 1
    executor: bool = False
    needs_files: str = ""
    not_in_checkpoint: tuple[tuple[str, str], ...] = ()
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    cannot_run: dict[str, str] = dataclasses.field(default_factory=dict)
    cannot_answer: dict[str, str] = dataclasses.field(default_factory=dict)
    why: str = ""

    def recipe(self) -> str:
        """Everything that determines its files, as text: a folder with another recipe is made again."""
        return json.dumps(
            [self.model_class, self.settings, self.finish, self.config_changes],
            sort_keys=True,
        )

    def scaled(self, factor: int) -> Case:
        """Return the same model ``factor`` times as wide; heads keep their size, so there are more of them."""

        def wider(settings: dict[str, Any]) -> dict[str, Any]:
            return {
                key: wider(value) if isinstance(value, dict) else value * factor if key in WIDTHS else value
                for key, value in settings.items()
            }

        if factor == 1:
            return self
        return dataclasses.replace(self, settings=wider(self.settings))

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Return ``engine_arguments`` with the folder filled in."""

        def filled(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: filled(inner) for key, inner in value.items()}
            return value.replace("{folder}", str(folder)) if isinstance(value, str) else value

        return {key: filled(value) for key, value in self.engine_arguments.items()}


def listed(reasons: dict[str, str], traits: frozenset[str]) -> str | None:
    """Return the reason that applies to a platform with these traits, or None."""
    return next((reason for trait, reason in reasons.items() if trait == "any" or trait in traits), None)


def from_file(path: Path, catalogue: list[Case]) -> list[Case]:
    """Read cases from a JSON file: a list of objects, each with ``name`` and ``like`` (a case of the
    catalogue), and any field of :class:`Case` that differs. Mappings are merged over those of ``like``.

    Raises:
        ValueError: no such case or field; the text names it.
    """
    known = {case.name: case for case in catalogue}
    fields = {field.name for field in dataclasses.fields(Case)}
    found = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        like = known.get(entry.get("like", ""))
        if like is None:
            raise ValueError(f"{path}: like={entry.get('like')!r} is none of {', '.join(known)}")
        changes: dict[str, Any] = {}
        for key, value in entry.items():
            if key == "like":
                continue
            if key not in fields:
                raise ValueError(f"{path}: {key} is none of {', '.join(sorted(fields))}")
            before = getattr(like, key)
            if isinstance(before, dict):
                changes[key] = {**before, **value}
            else:
                changes[key] = tuple(value) if isinstance(before, tuple) else value
        found.append(dataclasses.replace(like, **changes))
    return found
