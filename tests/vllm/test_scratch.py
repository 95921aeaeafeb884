"""What is left out as scratch is still there in vLLM under these names; a rule that has outlived its class goes."""

from __future__ import annotations

import re

from tests.vllm.sources import folder
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES


def test_every_rule_about_a_class_is_about_one_that_vllm_has() -> None:
    wanted = {kind for kind, _ in VLLM_RULES.scratch_of_class} | set(VLLM_RULES.scratch_objects)
    defined = re.compile(rf"^class ({'|'.join(sorted(wanted))})\b", re.MULTILINE)
    text_of: dict[str, str] = {}
    flagged = ""
    # Models hold some of what transformers makes.
    theirs = [folder("transformers") / name for name in ("tokenization_utils_base.py", "processing_utils.py")]
    for file in (*folder("vllm").rglob("*.py"), *theirs):
        text = file.read_text()
        for kind in defined.findall(text):
            text_of[kind] = text_of.get(kind, "") + text
        if any(f"self.{flag} = " in text for flag, _ in VLLM_RULES.scratch_if_flag):
            flagged += text
    assert wanted - text_of.keys() == set()
    assert {
        (kind, name) for kind, name in VLLM_RULES.scratch_of_class if not re.search(rf"\b{name}\b", text_of[kind])
    } == set()
    assert {name for _, name in VLLM_RULES.scratch_if_flag if name not in flagged} == set()
