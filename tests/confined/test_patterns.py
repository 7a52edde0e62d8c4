"""Regular expressions of an adapter_config.json: PEFT's results, and an end."""

import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from rslora_jax.confined import Exceeded, process
from rslora_jax.interop.peft.files import PeftFolder
from rslora_jax.interop.peft.matching import Matcher
from rslora_jax.interop.peft.settings import read_settings

MODULES = [f"model.layers.{n}.{m}" for n in (0, 3, 12) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
BOMBS = [
    r"(a+)+b",
    r"(a|a)*b",
    r"(.*)*=",
    r"(?:a?){60}a{60}",
    r"(x|.*.*.*.*.*.*.*.*)=",
    "(?:(?:a{1,9000}){1,9000}){1,90}b",
]
_PARTS = st.sampled_from(
    [
        "model",
        r"\.",
        ".",
        ".*",
        "layers",
        r"\d+",
        "[03]",
        "(?:q|v)_proj",
        "self_attn",
        "mlp",
        "up",
        "(a|b)",
        "$",
        "^",
        "_",
    ]
)
PATTERNS = st.lists(_PARTS, min_size=1, max_size=7).map("".join)


def settings_of(**fields):
    base = {"peft_type": "LORA", "r": 5, "lora_alpha": 7, "target_modules": ["q_proj"]}
    return read_settings(PeftFolder(Path("in"), base | fields))


@settings(max_examples=60, deadline=None)
@given(PATTERNS, st.sampled_from(["match", "fullmatch", "search"]))
def test_what_matches_is_what_pythons_own_engine_matches(pattern, how):
    for module in MODULES:
        want = getattr(re, how)(pattern, module) is not None
        assert (Matcher(Path("c")).first(how, (pattern,), module) is not None) == want


@settings(max_examples=40, deadline=None)
@given(st.lists(PATTERNS, max_size=3, unique=True), PATTERNS, PATTERNS)
def test_modules_ranks_and_layers_are_those_of_pefts_rules(patterns, target, exclude):
    """PEFT's own lines: `re.fullmatch` on targets, and the first key that matches the end of a name from a dot on."""
    ranks = {pattern: n + 2 for n, pattern in enumerate(patterns)}
    its = settings_of(rank_pattern=ranks, target_modules=target, exclude_modules=exclude)
    for module in MODULES:
        assert its.adapts(module) == bool(re.fullmatch(target, module) and not re.fullmatch(exclude, module))
        key = next((p for p in ranks if re.match(rf"(.*\.)?({p})$", module)), module)
        assert its.rank_and_alpha(module) == (ranks.get(key, 5), 7)


FIELDS = ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern", "modules_to_save"]


@pytest.mark.parametrize(("bomb", "field"), [*((BOMBS[0], f) for f in FIELDS), *((b, FIELDS[0]) for b in BOMBS[1:])])
def test_a_pattern_that_backtracks_for_ever_is_refused(bomb, field, monkeypatch):
    process.close_all()
    monkeypatch.setattr(process, "SECONDS", 0.2)
    monkeypatch.setattr("rslora_jax.interop.peft.matching._SECONDS", 0.2)
    value = {"target_modules": bomb, "exclude_modules": bomb, "rank_pattern": {bomb: 3}}.get(field, [bomb])
    layers = {"layers_to_transform": [1], "target_modules": ["x"]} if field == "layers_pattern" else {}
    with pytest.raises(Exceeded, match=r"adapter_config.json: matching its regular expressions") as refused:
        its = settings_of(**{field: value}, **layers)
        name = "a" * 4000 + (".q_proj" if field != "layers_pattern" else ".0.x")
        its.adapts(name)
        its.rank_and_alpha(name)
    process.close_all()
    assert len(str(refused.value)) <= 300
