"""What the zoo knows about one model: how it is made, how it is asked, and what must come of it. Plain data."""

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
        name: what ``--only`` selects and the seed key is made of.
        covers: what about it is worth a row, in a few words.
        model_class: the class of transformers that makes the weights.
        settings: its configuration, without what ``COMMON`` gives.
        finish: names of steps in ``checkpoints.STEPS`` that turn the saved model into what is loaded, in order.
        config_changes: what config.json gets besides; nested where the value is a mapping.
        engine_arguments: vLLM's, besides the common ones. ``{folder}`` in a text stands for the model's folder.
        asks: see ``workers.Order``.
        adapter: a LoRA adapter is asked as well.
        media: ``image`` or ``audio``: one goes with one more prompt, at the place of the token ``media_token``.
        models: how many models one worker loads: 2 with a draft.
        ranks: workers of one instance; tensor-parallel, unless ``engine_arguments`` say pipeline_parallel_size or
            data_parallel_size. Of a dense model with replicas, as many as those.
        replicas: data parallel engines of a dense model, which vLLM makes independent of each other: each may fork
            from any seed.
        executor: vLLM's own executor starts the workers, on as many nodes as ``engine_arguments`` say (nnodes), each a
            process of this host; else every worker is launched by itself, as torchrun does.
        needs_files: why even a fork needs the weight files at hand; empty where it does without.
        not_in_checkpoint: class of the model and name of each tensor that no checkpoint gives a value, since something
            replaces it later; what they are as loaded is not held against the default load, only against the seed.
        refused: why this must not fork; a part of what the log must say.
        cannot_run: a part of what vLLM itself says when it cannot load this at all.
        cannot_answer: why vLLM can load this and not run it; it is then loaded and compared only.

        why: what stands behind such a listing, in words.

    ``refused``, ``cannot_run`` and ``cannot_answer`` go by trait of the platform, see ``processes.platform_facts``;
    ``any`` is everywhere.
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
        """Everything that shapes its files, as text: folders of another recipe are made again."""
        return json.dumps(
            [self.model_class, self.settings, self.finish, self.config_changes],
            sort_keys=True,
        )

    def scaled(self, factor: int) -> Case:
        """The same model ``factor`` times as wide; heads keep their size, so that there are more of them."""

        def wider(settings: dict[str, Any]) -> dict[str, Any]:
            return {
                key: wider(value) if isinstance(value, dict) else value * factor if key in WIDTHS else value
                for key, value in settings.items()
            }

        if factor == 1:
            return self
        return dataclasses.replace(self, settings=wider(self.settings))

    def arguments(self, folder: Path) -> dict[str, Any]:
        """``engine_arguments`` with the folder put in."""

        def filled(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: filled(inner) for key, inner in value.items()}
            return value.replace("{folder}", str(folder)) if isinstance(value, str) else value

        return {key: filled(value) for key, value in self.engine_arguments.items()}


def listed(reasons: dict[str, str], traits: frozenset[str]) -> str | None:
    """The reason that holds on a platform with these traits; None where there is none."""
    return next((reason for trait, reason in reasons.items() if trait == "any" or trait in traits), None)


def from_file(path: Path, catalogue: list[Case]) -> list[Case]:
    """Specimens that a JSON file describes: a list of objects, each with ``name`` and ``like`` (a case of the
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
