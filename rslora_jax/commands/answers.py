"""What a model writes before and after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def answerer(base: Any, asked: Sequence[Any], max_len: int) -> Callable[..., list[str]]:
    """Return the function of a model, or of one with adapters, that lets it write.

    Adapters are applied and not merged: that would be a second base beside the first.
    """
    from rslora_jax.train import samples

    max_len = min(max_len, base.config.max_len)

    def answers(model: Any, lora: Any = None, adapters: Any = None) -> list[str]:
        def run(both: Any, *args: Any, **kwargs: Any) -> Any:
            return lora.apply(*both, *args, **kwargs)

        own, given = (base.apply, model.variables) if lora is None else (run, (model.variables, adapters))
        return samples.write(own, given, model.config, base.tokenizer, asked, max_new=40, max_len=max_len)

    return answers


def show_answers(asked: Sequence[Any], answers: dict[str, list[str]]) -> None:
    """Print each prompt with what was answered, and what is wanted."""
    from rslora_jax.train import samples

    for n, example in enumerate(asked):
        said = {name: texts[n] for name, texts in answers.items()} | {"wanted": example.completion}
        print(samples.show(example, said), flush=True)
