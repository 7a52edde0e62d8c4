"""What a model writes before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def answerer(base: Any, asked: Sequence[Any], max_len: int) -> Callable[..., list[str]]:
    """Return the function of a model, or of one with adapters, that lets it write.

    An array base and the merged one share what is compiled. A packed base is not merged, which would make it dense.
    """
    from rslora_jax.interop.untied import merge_model
    from rslora_jax.sites import named_leaves
    from rslora_jax.stored import is_stored
    from rslora_jax.train import samples

    is_packed = any(map(is_stored, named_leaves(base.variables).values()))
    apply, max_len = base.apply, min(max_len, base.config.max_len)  # one `apply` for both: it tells programs apart

    def answers(model: Any, lora: Any = None, adapters: Any = None) -> list[str]:
        if lora is not None and is_packed:

            def run(both: Any, *args: Any, **kwargs: Any) -> Any:
                return lora.apply(*both, *args, **kwargs)

            own, given = run, (model.variables, adapters)
        else:
            model = model if lora is None else merge_model(model, lora, adapters)
            own, given = apply if model.config == base.config else model.apply, model.variables
        return samples.write(own, given, model.config, base.tokenizer, asked, max_new=40, max_len=max_len)

    return answers


def show_answers(asked: Sequence[Any], answers: dict[str, list[str]]) -> None:
    """Print each prompt with what was answered, and what is wanted."""
    from rslora_jax.train import samples

    for n, example in enumerate(asked):
        said = {name: texts[n] for name, texts in answers.items()} | {"wanted": example.completion}
        print(samples.show(example, said), flush=True)
