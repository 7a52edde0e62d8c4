"""What a generation_config.json asks for is obeyed, unless a flag says otherwise, or said to be ignored."""

from __future__ import annotations

import json

import jax
import pytest

from rslora_jax.cli import main
from rslora_jax.interop.generation_config import read_generation
from rslora_jax.interop.load import load_model
from rslora_jax.models.generation import generate

from . import folders

pytestmark = [pytest.mark.by_day_on("newest"), pytest.mark.usefixtures("compile_fast")]
FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
QWEN = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
QWEN |= {"bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": 2, "transformers_version": "4.40"}
GREEDY = {"temperature": 0.0}

# (the file, the flags, how tokens are chosen, what is said of the file)
CASES = [
    ({}, {}, GREEDY, []),
    (QWEN, {}, {name: QWEN[name] for name in FLAGS if name != "min_p"}, [
        "do_sample", "temperature=0.7", "top_k=20", "top_p=0.8", "repetition_penalty=1.05"]),
    (QWEN, {"temperature": 0.0}, GREEDY | {"repetition_penalty": 1.05}, ["repetition_penalty=1.05"]),
    (QWEN, {"temperature": 2.0, "top_k": 3, "repetition_penalty": 1.0},
     {"temperature": 2.0, "top_k": 3, "top_p": 0.8, "repetition_penalty": 1.0}, ["top_p=0.8"]),
    # Without do_sample transformers takes the likeliest, whatever else is there; a flag that draws goes by it.
    ({"temperature": 0.6, "top_p": 0.9}, {}, GREEDY, []),
    ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.5}, {"temperature": 0.5, "top_p": 0.9}, ["top_p=0.9"]),
    ({"do_sample": False, "min_p": 0.1}, {"temperature": 0.5}, {"temperature": 0.5, "min_p": 0.1}, ["min_p=0.1"]),
    # As transformers draws: among 50 where the file does not say among how many.
    ({"do_sample": True}, {}, {"temperature": 1.0, "top_k": 50}, ["do_sample"]),
    ({"do_sample": True, "top_k": 0}, {}, {"temperature": 1.0, "top_k": 0}, ["do_sample"]),
    ({"do_sample": True, "temperature": None}, {"top_k": 7}, {"temperature": 1.0, "top_k": 7}, ["do_sample"]),
    ({"repetition_penalty": 1}, {}, GREEDY | {"repetition_penalty": 1.0}, []),
]  # fmt: skip


@pytest.mark.parametrize(("file", "flags", "how", "said"), CASES)
def test_what_is_asked_for_is_done_where_no_flag_says_otherwise(file, flags, how, said, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    asked = read_generation(tmp_path)
    found, used = asked.how(dict.fromkeys(FLAGS) | flags)
    assert found == how and sorted(used) == sorted(said) and not asked.ignored


def test_what_has_no_effect_here_is_said(tmp_path):
    idle = {"num_beams": 1, "no_repeat_ngram_size": 0, "use_cache": True, "typical_p": 1.0, "bad_words_ids": None}
    idle |= {"renormalize_logits": False, "_from_model_config": True, "output_scores": False, "suppress_tokens": []}
    others = {"num_beams": 4, "no_repeat_ngram_size": 3, "bad_words_ids": [[3]], "typical_p": 0.9, "penalty_alpha": 0.6}
    for file, ignored in ((idle, set()), (idle | others, set(others)), ({"max_length": 77}, {"max_length"})):
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
        assert {one.partition("=")[0] for one in read_generation(tmp_path).ignored} == ignored
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_length": 77, "max_new_tokens": 5}))
    assert not read_generation(tmp_path).ignored


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            {"temperature": "hot"},
            {"temperature": float("inf")},
            {"temperature": 10**400},
            {"top_k": 2.5},
            {"top_k": True},
        ),
        *({"top_p": 0}, {"top_p": 1.5}, {"min_p": -1}, {"repetition_penalty": 0}, {"max_new_tokens": 0}),
        *({"do_sample": 1}, {"top_p": float("nan")}, {"top_k": -(10**9)}),
    ],
)
def test_what_no_text_can_be_written_by_is_refused(wrong, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=rf"generation_config.json has {next(iter(wrong))}="):
        read_generation(tmp_path)


def test_the_command_writes_as_the_file_asks(tmp_path, capsys):
    folder = folders.write(tmp_path / "model", {"max_position_embeddings": 128})
    file = {"do_sample": True, "temperature": 3.0, "top_k": 4, "repetition_penalty": 1.5, "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(file | {"num_beams": 2, "eos_token_id": [1, 7]}))
    loaded = load_model(folder, scan_layers=False)

    def by_hand(**how):
        ids = [loaded.tokenizer.encode(loaded.tokenizer.chat([{"role": "user", "content": "hi"}]))]
        (out,) = generate(loaded.apply, loaded.variables, ids, loaded.config, eos_id=loaded.tokenizer.stop_ids, **how)
        return loaded.tokenizer.decode(out, skip_special=True).strip()

    def by_command(*flags):
        assert main(["generate", "--model", str(folder), "--prompt", "hi", *flags]) == 0
        out, err = capsys.readouterr()
        return out.strip(), err

    key = jax.random.fold_in(jax.random.key(0), 0)
    out, err = by_command()
    assert out == by_hand(max_new=7, temperature=3.0, top_k=4, repetition_penalty=1.5, key=key)
    assert (
        "as generation_config.json asks: do_sample, temperature=3, top_k=4, repetition_penalty=1.5, max_new_tokens=7; "
        "not obeyed: num_beams=2\n"
    ) in err
    out, err = by_command("--temperature", "0", "--repetition-penalty", "1", "--max-new", "5")
    assert out == by_hand(max_new=5) and "of generation_config.json; not obeyed: num_beams=2\n" in err
