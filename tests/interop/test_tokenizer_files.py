"""The tokenizer of a Hugging Face folder, from the files that have a say in it."""

import json
import re

import pytest
from tokenizers import AddedToken, Tokenizer

from rslora_jax.interop.huggingface import load_huggingface
from rslora_jax.interop.tokenizer_files import read_tokenizer

from . import folders

pytestmark = pytest.mark.by_day_on("newest")


def test_the_tokenizer_and_what_its_files_say_beside_it(tmp_path):
    folders.write(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 2, 16)
    # Neither cut nor padded, whatever tokenizer.json says of it.
    assert tokenizer.encode("hi hi hi 12!") == [0, 5, 6, 5, 6, 5, 6, 7, 8, 9] and tokenizer.encode("h") == [0, 3]
    text = tokenizer.chat([{"role": "user", "content": "hi"}])
    assert text == "<s>user: hi</s>"
    assert tokenizer.encode(text)[:2] == [0, 11] and tokenizer.encode(text).count(0) == 1
    assert tokenizer.decode([0, 5, 1], skip_special=True) == "hi"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0] | tojson }}{{ tools is none }}{{ pad_token }}")
    assert read_tokenizer(tmp_path).chat([{"role": "é<"}]) == '{"role": "é<"}True<pad>'
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match=rf"does not take these messages: no \(that of {re.escape(str(tmp_path))}\)"):
        read_tokenizer(tmp_path).chat([{"role": "user", "content": "a"}])
    folders.tokenizer_json(tmp_path, bos=False)
    assert read_tokenizer(tmp_path).encode("hi") == [5]


def test_tokens_that_only_the_config_knows_are_added_and_the_llama_class_puts_its_own_in_front(tmp_path):
    folders.write(tmp_path)
    folders.tokenizer_json(tmp_path, bos=False)
    about = {
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}],
        "added_tokens_decoder": {
            "16": {"content": "<tool>", "special": True},
            "17": {"content": "<t>", "special": False},
        },
    }

    def read(**changes):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | changes))
        return read_tokenizer(tmp_path)

    tokenizer = read()
    assert tokenizer.encode("hi<tool><t>") == [0, 5, 16, 17]
    assert tokenizer.vocab_size == 19  # that class has an <unk>
    assert tokenizer.decode([0, 5, 16, 17], skip_special=True) == "hi<t>"
    assert tokenizer.chat([]) == "yes" and tokenizer.eos_id == 1
    assert read(add_bos_token=False).encode("hi") == [5]
    with pytest.raises(ValueError, match="eos_token behind every text"):
        read(add_eos_token=True)
    with pytest.raises(ValueError, match=r"token '<tool>' has another id in tokenizer_config.json"):
        read(added_tokens_decoder={"20": {"content": "<tool>"}})


def test_writing_stops_at_what_generation_config_says_and_at_the_end_of_a_text(tmp_path):
    folders.write(tmp_path, {"eos_token_id": 7})
    assert load_huggingface(tmp_path).tokenizer.stop_ids == (1, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 1, 8]}')
    tokenizer = load_huggingface(tmp_path).tokenizer
    assert (tokenizer.stop_ids, tokenizer.eos_id) == ((1, 9, 8), 1)


def test_an_added_token_may_have_no_row_where_it_is_of_no_use_to_text(tmp_path):
    folders.write(tmp_path, {"vocab_size": 16})
    path = tmp_path / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.add_tokens([AddedToken("<picture>", special=True)])
    backend.save(str(path))
    assert load_huggingface(tmp_path).tokenizer.vocab_size == 17
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def say(**named):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about | named))
        return load_huggingface(tmp_path).tokenizer

    assert say(pad_token="<picture>").pad_id == 1  # in a padded place nothing is looked at: another token stands there
    with pytest.raises(ValueError, match=r"has 17 tokens in tokenizer\.json and vocab_size 16"):
        say(eos_token="<picture>")


# What version 5 of transformers writes beside tokenizer.json, and what version 5.24 makes of it: of tokenizer.json with
# <s> in front or without, and these fields, (the ids of "hi", those of "hi<tool>").
FIVE = {"backend": "tokenizers", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
AS_FIVE = [
    (True, {"tokenizer_class": "TokenizersBackend"}, [0, 5]),
    (False, {"tokenizer_class": "TokenizersBackend"}, [5]),
    (True, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": None, "unk_token": "<s>"}, [0, 5]),
    (False, {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": None, "unk_token": "<s>"}, [5]),
    (False, {"tokenizer_class": "GemmaTokenizer", "unk_token": "<s>"}, [5]),
    (False, {"tokenizer_class": "TokenizersBackend", "add_bos_token": True}, [0, 5]),
    (True, {"tokenizer_class": "TokenizersBackend", "add_bos_token": False}, [5]),
    (True, {"tokenizer_class": "LlamaTokenizer", "add_eos_token": False}, [5]),
]
TOOL = [
    {"extra_special_tokens": ["<tool>"]},
    {"additional_special_tokens": [{"content": "<tool>", "special": True}]},
    {"extra_special_tokens": {"tool_token": "<tool>"}},
    {"extra_special_tokens": [], "tool_token": "<tool>"},
]


@pytest.mark.parametrize(("bos", "fields", "ids"), AS_FIVE)
@pytest.mark.parametrize("tool", TOOL)
def test_files_of_transformers_5_give_its_ids(tmp_path, bos, fields, ids, tool):
    folders.tokenizer_json(tmp_path, bos=bos)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(FIVE | fields | tool))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ tool_token }}{{ eos_token }}")
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 2, 17)
    assert tokenizer.encode("hi") == ids and tokenizer.encode("hi<tool>") == [*ids, 16]
    assert tokenizer.decode([5, 16], skip_special=True) == "hi"
    named = "<tool>" if "tool_token" in json.dumps(tool) else ""
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == f"hi{named}</s>"


def test_what_transformers_5_puts_behind_every_text_is_refused(tmp_path):
    folders.tokenizer_json(tmp_path, bos=False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(FIVE | {"add_eos_token": True}))
    with pytest.raises(ValueError, match="eos_token behind every text"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("add_bos", [True, False, None])
def test_gemma_s_class_of_transformers_4_puts_its_own_in_front_too(tmp_path, add_bos):
    folders.tokenizer_json(tmp_path, bos=add_bos is False)
    about = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    about |= {"pad_token": "<pad>"} | ({} if add_bos is None else {"add_bos_token": add_bos})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    assert read_tokenizer(tmp_path).encode("hi") == ([5] if add_bos is False else [0, 5])
