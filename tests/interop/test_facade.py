"""What users import of models and interop: all of it is there, and what needs an extra is imported when asked for."""

import subprocess
import sys
import textwrap

import pytest

from rslora_jax import interop, models

EXTRAS = ("gguf", "huggingface_hub", "jinja2", "safetensors", "tokenizers", "torch")
ALONE = f"""
    import sys
    for name in {EXTRAS}:
        sys.modules[name] = None  # an import of it is an ImportError
    import jax, jax.numpy as jnp, tempfile
    import rslora_jax as rslora
    from rslora_jax import interop, models

    params, names = {{"w": jnp.ones((6, 4))}}, {{"w": interop.Weight("up.weight", transposed=True)}}
    lora = rslora.wrap(lambda p, x: x @ p["w"], params, jnp.ones((2, 6)), config=rslora.LoraConfig(rank=2, alpha=3))
    adapters = lora.init(jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        interop.save_peft(folder, lora, adapters, names, replaced={{"w": params["w"]}})
        back = interop.load_peft(folder, lora, names)
    assert (back.adapters["w"]["a"] == adapters["w"]["a"]).all() and (back.replaced["w"] == 1).all()
    assert interop.DECODER.shapes(models.LLAMA2_7B)["params"]["norm"]["scale"].shape == (4096,)
    try:
        interop.load_gguf
    except ImportError:
        print("alone")
"""


@pytest.mark.parametrize("part", [interop, models])
def test_every_name_is_there_and_documented(part):
    assert set(part.__all__) <= set(dir(part))
    for name in part.__all__:
        found = getattr(part, name)
        assert not callable(found) or (found.__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match=f"module '{part.__name__}' has no attribute 'nothing'"):
        part.nothing  # noqa: B018


@pytest.mark.by_day_on("oldest")
def test_peft_and_models_need_no_extra():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(ALONE)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "alone\n", done.stderr[-3000:]
