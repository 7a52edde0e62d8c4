"""How a token is chosen, against transformers' own processors of logits."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from rslora_jax.models.sampling import changed, choosing

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.reference, pytest.mark.xdist_group("reference"), pytest.mark.usefixtures("compile_fast")]

CASES = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), values, strict=True))
    for values in itertools.product((0.7, 1.6), (0, 5), (1.0, 0.8), (0.0, 0.2), (1.0, 1.3, 0.6))
]


def test_logits_are_changed_as_transformers_changes_them():
    rng = np.random.default_rng(0)
    for case in CASES:
        logits = rng.normal(0, 3, (1, 23)).astype(np.float32)
        ids = rng.integers(0, 23, (1, 9))
        model = transformers.LlamaForCausalLM.__new__(transformers.LlamaForCausalLM)
        config = transformers.GenerationConfig(do_sample=True, **case | {"min_p": case["min_p"] or None})
        # Of its own making, so that they come in its own order.
        processors = getattr(model, "_get_logits_processor")(config, input_ids_seq_length=9)  # noqa: B009
        want = processors(torch.tensor(ids), torch.tensor(logits)).numpy()[0]
        seen = np.isin(np.arange(23), ids)
        got = changed(jnp.array(logits[0]), jnp.array(seen), choosing(vocab_size=23, **case))
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=str(case))
