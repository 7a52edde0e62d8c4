"""How a model's generation_config.json asks for text to be written: what is obeyed of it, and what is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rslora_jax.interop.huggingface import GENERATION
from rslora_jax.interop.json_files import read_json

# What is obeyed, of what kind, and within what bounds.
_MOST = 1 << 31
_OBEYED: Mapping[str, tuple[Any, float, float]] = {
    "do_sample": (bool, 0, 1),
    "temperature": (float, 0, _MOST),
    "top_k": (int, 0, _MOST),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0, _MOST),
    "max_new_tokens": (int, 1, _MOST),
}
# What changes no token: ids (which the tokenizer has), how it is computed, and what is given back beside the text.
_HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
    *("use_cache", "cache_implementation", "cache_config", "prefill_chunk_size", "compile_config", "disable_compile"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("return_legacy_cache", "low_memory", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
    *("early_stopping", "length_penalty"),  # of beams, which are said themselves
}
# Numbers that change nothing where they are 1; of all others 0 changes nothing.
_ONES = {"num_beams", "num_beam_groups", "typical_p", "encoder_repetition_penalty", "guidance_scale"}
_ONES |= {"num_return_sequences"}
_IDLE = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
# transformers draws among so many where its file says that it draws, and not among how many.
_USUAL_TOP_K = 50


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a generation_config.json asks for: `obeyed`, its values by name, and `ignored`, what has no effect here."""

    obeyed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def how(self, flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Give the options of `models.sampling.choosing`, with what is said of them by flags in front.

        Args:
          flags: temperature, top_k, top_p, min_p and repetition_penalty; None where it was not said.

        Returns:
          the options, and which of the file's values have an effect.

        >>> asked = Asked({"do_sample": True, "temperature": 0.6, "top_k": 20})
        >>> asked.how({"temperature": None, "top_k": 5})
        ({'temperature': 0.6, 'top_k': 5}, ['do_sample', 'temperature=0.6'])
        >>> asked.how({"temperature": 0.0})
        ({'temperature': 0.0}, [])
        """
        given = {name: value for name, value in flags.items() if value is not None}
        own = {name: value for name, value in self.obeyed.items() if name not in ("do_sample", "max_new_tokens")}
        usual: dict[str, Any] = {"temperature": 0.0}
        if self.obeyed.get("do_sample"):
            usual = {"temperature": 1.0, "top_k": _USUAL_TOP_K}
        else:
            own.pop("temperature", None)  # it is for drawing, which the file does not ask for
        found = usual | own | given
        if not found["temperature"]:
            found = {name: value for name, value in found.items() if name in ("temperature", "repetition_penalty")}
        of_file = [name for name in found if name in own and name not in given and found[name] != _IDLE.get(name)]
        draws = ["do_sample"] if "temperature" not in given and found["temperature"] else []
        return found, [*draws, *(f"{name}={found[name]:g}" for name in of_file)]


def read_generation(folder: Path | None) -> Asked:
    """Read the generation_config.json of a model's folder; nothing is asked for where there is none.

    Raises:
      ValueError: it is damaged, or a value that is obeyed is of another kind or out of its range.
    """
    if folder is None or not (path := folder / GENERATION).is_file():
        return Asked()
    found = {name: value for name, value in read_json(path).items() if value is not None}
    obeyed = {name: _value(path, name, found[name]) for name in _OBEYED if name in found}
    ignored = [
        f"{name}={value!r}"[:60]
        for name, value in found.items()
        if name not in _OBEYED and name not in _HARMLESS and not name.startswith("_") and not _is_idle(name, value)
    ]
    if "max_new_tokens" in obeyed:
        ignored = [one for one in ignored if not one.startswith("max_length=")]
    return Asked(obeyed, tuple(ignored))


def _value(path: Path, name: str, value: Any) -> Any:
    kind, least, most = _OBEYED[name]
    is_kind = type(value) in ((float, int) if kind is float else (kind,))
    if not is_kind or not least <= value <= most or (name in ("top_p", "repetition_penalty") and not value):
        raise ValueError(f"{path} has {name}={value!r:.60}, which no text is written by: correct it, or take it out")
    return kind(value)


def _is_idle(name: str, value: Any) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == (1 if name in _ONES else 0)
    return not value
