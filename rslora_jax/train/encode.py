"""From examples to tokens: the chat template, which tokens are learnt, and how long ones are made to fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rslora_jax.train.examples import Example
from rslora_jax.train.turns import Tokenizer, find_turn, join


@dataclass(frozen=True, eq=False)
class Encoded:
    """Hold the tokens of one example: `ids_N` int32, and `is_learnt_N` bool, true where there is loss.

    `is_learnt_N[i]` says that predicting token i, from those before it, is part of the loss; nothing comes
    before token 0, so it is never learnt. `cut` counts the tokens taken from the prompt and from the
    completion.
    """

    ids_N: np.ndarray
    is_learnt_N: np.ndarray
    cut: tuple[int, int] = (0, 0)


class Tokens(NamedTuple):
    """Hold the tokens of E examples, which make S sequences of N tokens in all, in plain arrays.

    - ids_N: int32, and is_learnt_N: bool, of all sequences, one after the other (see `Encoded`).
    - lengths_S: int64, the number of tokens of each sequence.
    - sequences_E: int64, the number of sequences of each example.
    """

    ids_N: np.ndarray
    is_learnt_N: np.ndarray
    lengths_S: np.ndarray
    sequences_E: np.ndarray

    def by_example(self) -> Iterator[list[Encoded]]:
        """Give the sequences of each example, as views."""
        ends_S = np.cumsum(self.lengths_S)
        parts = map(slice, (ends_S - self.lengths_S).tolist(), ends_S.tolist())
        for count in self.sequences_E.tolist():
            yield [Encoded(self.ids_N[part], self.is_learnt_N[part]) for part in itertools.islice(parts, count)]


def encode_all(tokenizer: Tokenizer, examples: Sequence[Example], skip_bad: bool = False) -> Tokens:
    """Turn examples, at least one, into tokens. See `encode_example`.

    Where they are to be skipped, those that cannot be encoded have no sequence.

    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> encode_all(ByteTokenizer(), [Example("ab", "c"), Example("", "d")]).lengths_S.tolist()
    [4, 2]
    """
    encode = _encode_or_skip if skip_bad else encode_example
    encoded = [encode(tokenizer, example) for example in examples]
    sequences = [sequence for group in encoded for sequence in group]
    return Tokens(
        ids_N=np.concatenate([np.zeros(0, np.int32), *(sequence.ids_N for sequence in sequences)]),
        is_learnt_N=np.concatenate([np.zeros(0, bool), *(sequence.is_learnt_N for sequence in sequences)]),
        lengths_S=np.array([len(sequence.ids_N) for sequence in sequences], np.int64),
        sequences_E=np.array([len(group) for group in encoded], np.int64),
    )


def encode_example(tokenizer: Tokenizer, example: Example) -> list[Encoded]:
    """Turn one example into tokens, and mark those that are learnt.

    With a chat template the prompt is the user's turn and the completion the assistant's, which is learnt
    up to and including the template's end-of-turn token. Without one, prompt and completion are joined as
    they stand (a chat of one question gets a newline after it), and the eos token, which is learnt, follows.

    A chat gives one sequence in which all the assistant's turns are learnt. Some templates render a turn
    otherwise once it is history (they drop its reasoning, say): then that turn, as it is when it is
    generated, is a sequence of its own, so that what is learnt is always what the model will meet.

    What is given holds, or the example is refused: the tokens decode to what the template renders up to the end
    of that turn; each learnt turn has one token at which generation stops, its last; and all of the answer is
    learnt, but for white space at its ends and beside tags such as `<think>`, where templates write their own.

    Raises:
      ValueError: one of these cannot be had, the example leaves no token to learn, or it is a chat of several turns
        and the model has no chat template.

    >>> from rslora_jax.train.bytelevel import ByteTokenizer
    >>> encoded, = encode_example(ByteTokenizer(), Example("ab", "c"))
    >>> encoded.ids_N.tolist(), encoded.is_learnt_N.tolist()
    ([97, 98, 99, 256], [False, False, True, True])
    """
    origin = example.origin or "an example"
    try:
        if example.prompt == "" or tokenizer.chat_template is None:
            sequences = [_encode_plain(tokenizer, example)]
        else:
            sequences = _encode_chat(tokenizer, example)
    except ValueError as error:
        raise ValueError(f"{origin} cannot be encoded: {error}") from error
    if not all(sequence.is_learnt_N.any() for sequence in sequences):
        raise ValueError(f"{origin} leaves no token to learn; remove it")
    return sequences


def cut(encoded: Encoded, limit: int) -> Encoded:
    """Shorten an example to `limit` tokens, at the cost of its prompt first.

    The prompt loses its middle: its start has the special tokens and the instructions, its end the request.
    A completion that does not fit beside the prompt's first token is cut at its end, so there it does
    not learn to stop.

    >>> ids, learnt = np.arange(8, dtype=np.int32), np.arange(8) >= 6
    >>> cut(Encoded(ids, learnt), 5).ids_N.tolist()
    [0, 1, 5, 6, 7]
    """
    size = len(encoded.ids_N)
    if size <= limit:
        return encoded
    if limit < 2:
        raise ValueError(f"limit is {limit}; an example needs at least 2 tokens, one to read and one to learn")
    not_learnt = np.flatnonzero(~encoded.is_learnt_N)
    completion = int(not_learnt[-1]) + 1
    room = min(completion, max(limit - (size - completion), 1))
    kept_tail = room // 2
    kept_head = room - kept_tail
    kept = np.concatenate([np.arange(kept_head), np.arange(completion - kept_tail, size)])[:limit]
    is_learnt_N = encoded.is_learnt_N[kept]
    if kept_tail and room < completion:
        # The token after the gap would be predicted from the wrong one.
        is_learnt_N[kept_head] = False
    lost_prompt = completion - room
    return Encoded(encoded.ids_N[kept], is_learnt_N, (lost_prompt, size - limit - lost_prompt))


def windows(encoded: Encoded, limit: int) -> list[Encoded]:
    """Split plain text into consecutive windows of `limit` tokens, the last one shorter; nothing is lost.

    Each begins with the token that ended the one before, so that every token but the first is predicted
    once. At the start of a window little comes before, so what is learnt there is learnt from less.

    >>> text = Encoded(np.arange(6, dtype=np.int32), np.arange(6) > 0)
    >>> [window.ids_N.tolist() for window in windows(text, 3)]
    [[0, 1, 2], [2, 3, 4], [4, 5]]
    """
    if limit < 2:
        raise ValueError(f"limit is {limit}; a window needs at least 2 tokens, one to read and one to learn")
    size = len(encoded.ids_N)
    if size <= limit:
        return [encoded]
    parts = [slice(start, start + limit) for start in range(0, size - 1, limit - 1)]
    found = [Encoded(encoded.ids_N[part], encoded.is_learnt_N[part].copy()) for part in parts]
    for window in found:
        window.is_learnt_N[0] = False  # it was learnt at the end of the window before
    return found


def _encode_or_skip(tokenizer: Tokenizer, example: Example) -> list[Encoded]:
    try:
        return encode_example(tokenizer, example)
    except ValueError:
        return []


def _encode_plain(tokenizer: Tokenizer, example: Example) -> Encoded:
    prompt = example.prompt
    if example.tools or example.more:
        raise ValueError("it has tools and the model has no chat template to write them; use one that has")
    if not isinstance(prompt, str):
        if [message.role for message in prompt] != ["user"]:
            raise ValueError(
                "it is a chat of several turns and the model has no chat template; "
                "use an instruction-tuned model, or {prompt, completion} lines"
            )
        prompt = prompt[0].content + "\n"
    return _encoded(tokenizer, prompt, example.completion, is_turn=example.prompt != "")


def _encode_chat(tokenizer: Tokenizer, example: Example) -> list[Encoded]:
    messages = example.messages
    sequences: list[Encoded] = []
    for end, message in enumerate(messages):
        if message.role != "assistant" or not message.is_learnt:
            continue
        turn = _encoded(tokenizer, *find_turn(tokenizer, messages[: end + 1], example.tools))
        if sequences and _begins_with(turn, sequences[-1]):
            turn.is_learnt_N[: len(sequences[-1].ids_N)] |= sequences[-1].is_learnt_N
            sequences[-1] = turn
        else:
            sequences.append(turn)
    return sequences


def _encoded(tokenizer: Tokenizer, before: str, learnt: str, *, is_turn: bool = True) -> Encoded:
    """Encode a text of which the second part is learnt, and end it."""
    before_ids, learnt_ids = join(tokenizer, before, learnt)
    if not learnt_ids or learnt_ids[-1] not in tokenizer.stop_ids:
        learnt_ids = [*learnt_ids, tokenizer.eos_id]
    if is_turn and not before_ids:
        raise ValueError("nothing stands before the answer, so its first token cannot be learnt; give it a prompt")
    early = [i for i in learnt_ids[:-1] if i in tokenizer.stop_ids]
    if is_turn and early:
        raise ValueError(
            f"the answer holds {tokenizer.decode(early[:1])!r}, at which generation stops, before its end; take it out"
        )
    ids_N = np.asarray(before_ids + learnt_ids, dtype=np.int32)
    return Encoded(ids_N, np.arange(len(ids_N)) >= max(len(before_ids), 1))


def _begins_with(whole: Encoded, start: Encoded) -> bool:
    return np.array_equal(whole.ids_N[: len(start.ids_N)], start.ids_N)
