"""What to adapt and how: `LoraConfig`, and the patterns that select weights."""

import dataclasses
import difflib
import fnmatch
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from rslora_jax import scaling as scalings
from rslora_jax.methods.method import Method, method_of
from rslora_jax.shown import quoted, shown
from rslora_jax.transform.uses import USES

_LARGEST_RANK, _LARGEST_ALPHA = 1 << 31, 1e30  # beyond which no scale could be computed
_INITS = "use 'uniform', 'gaussian' or a function; starts such as pissa are rslora_jax.starts.pissa(lora, params, key)"
_MOST_ALTERNATIVES = 1000  # of one pattern: each brace multiplies them


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Say which weights get adapters, of which rank, and how they are scaled and initialised.

    Attributes:
      rank: rank r of every adapter that no pattern gives another.
      alpha: numerator of the scale gamma.
      scaling: "rslora" (alpha / sqrt(r), the default), "lora" (alpha / r), "constant" (alpha), or a
        function from r to gamma / alpha.
      targets: "all-linear" (every weight used in a matrix product, without embeddings and the output
        head), or globs over paths such as "*/{q,v}_proj/kernel"; `*` also crosses "/". A name such as "q_proj" is that
        of a module, as PEFT has it, here and in all other patterns (`module_names`). Of a tied weight, which is
        looked up and is the head too, "*/embedding@lookup" adapts the one use and "*/embedding@product" the other, as
        two adapters of PEFT do; without either, one adapter is that of both.
      exclude: globs over paths to leave out of `targets`.
      trained: globs over paths of parameters that are trained whole, of any shape, such as "*/classifier/*" or
        "*/norm*/scale": the value itself is in the adapters (PEFT's modules_to_save). They go before `targets`.
      trained_rows: globs over paths of tables, each with the numbers of the rows that are trained, such as those of new
        tokens: `{"*/embedding": [49152, 49153]}` (PEFT's trainable_token_indices). A table that is the head too has
        them in both uses; of a head of its own they are its outputs. A mapping, or a sequence of pairs.
      rank_pattern, alpha_pattern: globs over paths with the rank or alpha of the weights that match;
        the first match wins. A mapping, or a sequence of pairs. Numbers in braces name single layers, also of weights
        that are stacked, as for a scan, and have no number in their path: `{"*/layers/{3}/mlp/*": 64}`, `{0,2}`,
        `{4..7}`; so they do in `targets` and `exclude`.
      axes: globs over paths with a name for each axis of the weights that match, "in", "out" or "stack", where the use
        of a weight does not tell them: `{"*/experts": ("stack", "in", "out")}`. Such a weight is adapted whatever it is
        used in; where that has no low-rank form, the sum is formed.
      init: how A starts: "uniform" (PEFT's default, Kaiming-uniform: variance 1 / (3 in)), "gaussian" (variance 1 / in;
        PEFT's "gaussian" has the standard deviation 1 / r, which would shrink what is learnt with the rank), or a
        function (key, shape, dtype, fan_in) -> array. B starts at zero; so it does of a table, of which PEFT has A at
        zero and B at random.
      dtype: dtype in which adapters are held and trained; below 32 bits small steps are lost, which is said.
      on_fallback: "warn" or "error", where a weight is used in a way that has no low-rank form.
      allow_large_rank: accept a rank above a weight's full rank, min(in, out), with a warning. Without it `rank` is cut
        down to that for weights narrower than it, and a rank above it in `rank_pattern` is an error.
      dropout: the part of what an adapter sees that is set to zero in training, where `lora.apply` is given a
        `dropout_key`; the rest is as much larger (arXiv 1207.0580). The base sees all.
      method: what an adapter is, by the name of its file in `methods/` ("lora"), or a `Method` of your own.

    Raises:
      ValueError: for a rank below 1, an unknown name, or an alpha that is not a positive number.

    >>> config = LoraConfig(rank=24, alpha=16, rank_pattern={"*/mlp/*": 80})
    >>> LoraConfig.from_json(config.to_json()) == config
    True
    """

    rank: int = 32
    alpha: float = 16.0
    scaling: str | Callable[[int], float] = "rslora"
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    trained: str | Sequence[str] = ()
    trained_rows: Mapping[str, Sequence[int]] | Sequence[tuple[str, Sequence[int]]] = ()
    rank_pattern: Mapping[str, int] | Sequence[tuple[str, int]] = ()
    alpha_pattern: Mapping[str, float] | Sequence[tuple[str, float]] = ()
    axes: Mapping[str, Sequence[str]] | Sequence[tuple[str, Sequence[str]]] = ()
    init: str | Callable[..., Any] = "uniform"
    dtype: str = "float32"
    on_fallback: str = "warn"
    allow_large_rank: bool = False
    dropout: float = 0.0
    method: str | Method = "lora"

    def __post_init__(self) -> None:
        if isinstance(self.trained, str):
            object.__setattr__(self, "trained", (self.trained,))
        for name in ("targets", "exclude", "trained"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
            if not all(isinstance(pattern, str) for pattern in getattr(self, name)):
                raise ValueError(f"{name}={quoted(value)} are no patterns: give texts such as '*/q_proj/kernel'")
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            pairs = value.items() if isinstance(value, Mapping) else value
            object.__setattr__(self, name, tuple((str(p), v) for p, v in pairs))
        object.__setattr__(self, "trained_rows", _rows(self.trained_rows))
        stated = self.axes.items() if isinstance(self.axes, Mapping) else self.axes
        object.__setattr__(self, "axes", tuple((str(p), tuple(names)) for p, names in stated))
        named: Any = self.axes
        for pattern, names in named:
            if not {"in", "out"} <= set(names) <= {"in", "out", "stack"}:
                raise ValueError(
                    f"axes {pattern!r}: {names!r} does not name each axis 'in', 'out' or 'stack', with at least one "
                    "'in' and one 'out'"
                )
        ranks: Any = self.rank_pattern
        alphas: Any = self.alpha_pattern
        for rank in (self.rank, *(v for _, v in ranks)):
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < _LARGEST_RANK:
                raise ValueError(
                    f"rank={quoted(rank)} is not a positive whole number: an adapter needs a rank of 1 or more"
                )
        for alpha in (self.alpha, *(v for _, v in alphas)):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < _LARGEST_ALPHA:
                raise ValueError(f"alpha={quoted(alpha)} is not a positive number")
        if not callable(self.scaling):
            scalings.gamma(1, 1.0, self.scaling)  # refuses an unknown name
        if not callable(self.init) and self.init not in ("uniform", "gaussian"):
            raise ValueError(f"init={quoted(self.init)} is not known: {_INITS}")
        try:
            floating = jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)
        except TypeError:
            floating = False
        if not floating:
            raise ValueError(f"dtype={quoted(self.dtype)} is not a floating dtype: use 'float32' or 'bfloat16'")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout={quoted(self.dropout)} is not a part of the data: give a number from 0 to below 1"
            )
        method_of(self.method)  # refuses an unknown name
        if self.on_fallback not in ("warn", "error"):
            raise ValueError(f"on_fallback={quoted(self.on_fallback)} is not known: use 'warn' or 'error'")

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON values; a function in it, or a method of your own, is an error."""
        if not isinstance(self.method, str):
            raise ValueError("method is an object, which JSON cannot hold: name one in `methods/` to save this config")
        for name in ("scaling", "init"):
            if callable(getattr(self, name)):
                raise ValueError(
                    f"{name} is a function, which JSON cannot hold: name a built-in one to save this config"
                )
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LoraConfig":
        """Read what `to_dict` wrote; a field that this version does not know is an error."""
        unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(
                f"LoraConfig has no field {shown(', '.join(sorted(unknown)))}: was it written by a newer version?"
            )
        return cls(**fields)

    def to_json(self) -> str:
        """Return `to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "LoraConfig":
        """Read what `to_json` wrote."""
        return cls.from_dict(json.loads(text))


def _rows(given: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the rows to train by pattern; a ValueError for what are no numbers of rows."""
    pairs = given.items() if isinstance(given, Mapping) else given
    named = tuple((str(pattern), tuple(ids)) for pattern, ids in pairs)
    for pattern, ids in named:
        for n in ids:
            if not hasattr(n, "__index__") or isinstance(n, bool) or not 0 <= n < _LARGEST_RANK:
                raise ValueError(f"trained_rows {pattern!r}: {quoted(n)} is not the number of a row, from 0 on")
        if not ids or len(set(ids)) < len(ids):
            twice = next((n for n in ids if ids.count(n) > 1), None)
            what = "names no row" if twice is None else f"names row {twice} twice"
            raise ValueError(f"trained_rows {pattern!r} {what}: give each row that is to be trained once")
    return tuple((pattern, tuple(int(n) for n in ids)) for pattern, ids in named)


def matches(path: str, pattern: str) -> bool:
    """Say whether a path matches a glob; `*` crosses "/", and `{a,b}` gives alternatives.

    >>> matches("params/layers_3/attn/q_proj/kernel", "*/{q,v}_proj/kernel")
    True
    """
    return any(fnmatch.fnmatchcase(path, p) for p in expand_braces(pattern))


def expand_braces(pattern: str) -> list[str]:
    """Write out the alternatives of a pattern; `{2..4}` is `{2,3,4}`.

    Raises:
      ValueError: they are more than 1000.

    >>> expand_braces("{q,v}_proj/*"), expand_braces("layers_{2..4}/w")
    (['q_proj/*', 'v_proj/*'], ['layers_2/w', 'layers_3/w', 'layers_4/w'])
    """
    whole, open_ones = list[str](), [pattern]
    while open_ones:
        one = open_ones.pop()
        if (found := re.search(r"\{([^{}]*)\}", one)) is None:
            whole.append(one)
        else:
            head, tail = one[: found.start()], one[found.end() :]
            open_ones += [head + option + tail for part in reversed(found[1].split(",")) for option in _options(part)]
        if len(whole) + len(open_ones) > _MOST_ALTERNATIVES:
            raise ValueError(f"the pattern {pattern!r} has more than {_MOST_ALTERNATIVES} alternatives: write fewer")
    return whole


def _options(part: str) -> list[str]:
    """Return what a part of a brace stands for, the last first: itself, or the numbers of a run."""
    run = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", part)
    if run is None or int(run[2]) - int(run[1]) > _MOST_ALTERNATIVES:
        return [part]
    return [str(n) for n in reversed(range(int(run[1]), int(run[2]) + 1))]


def matches_adapter(path: str, pattern: str) -> bool:
    """Say whether a glob matches the path of an adapter, or, where that is of one use, the path of its weight.

    >>> matches_adapter("params/table@lookup", "*/table"), matches_adapter("params/table@lookup", "*@product")
    (True, False)
    """
    return matches(path, pattern) or matches(split_use(path)[0], pattern)


def split_use(path: str) -> tuple[str, str]:
    """Split "@lookup" or "@product" off a path, or a pattern.

    >>> split_use("*/table@lookup"), split_use("*/table")
    (('*/table', 'lookup'), ('*/table', ''))
    """
    whole, _, use = path.rpartition("@")
    return (whole, use) if use in USES else (path, "")


def literal(path: str) -> str:
    """Write a path as a glob that matches it.

    >>> literal("params/w[0]")
    'params/w[[]0]'
    """
    return re.sub(r"[{}]", "?", re.sub(r"[*?\[]", r"[\g<0>]", path))


def near_misses(pattern: str, paths: Sequence[str]) -> str:
    """Name up to three paths that resemble a pattern that matches none."""
    close = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3)
    words = [w for w in re.split(r"[^A-Za-z0-9_]+", pattern) if w]
    holding = [p for p in paths if words and all(w in p for w in words)]
    found = list(dict.fromkeys([*holding[:3], *close]))[:3]
    return ", ".join(found or list(paths)[:3])
