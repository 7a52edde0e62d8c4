"""Random programs as plain data, and their meaning; as a script, a table of what becomes of each piece's weight.

python -m tests.random_programs.program --count 500
"""

import argparse
import collections
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import rslora_jax as rslora
from tests.random_programs.around import AROUND, PLACES, STACKS
from tests.random_programs.changes import CHANGES
from tests.random_programs.formats import BLOCK
from tests.random_programs.forms import ALPHA, PLAIN, Form, has_rows, row_axis
from tests.random_programs.scope import STACK, WIDEST, Scope, as_is, flat, widths
from tests.random_programs.uses import USES

NOT_RAGGED = {"vmap_data", "vmap_stack", "map_rows", "force", "inner_step"}
TWICE = {"both_sides", "dense_and_back", "lookup_tied"}  # the uses in which a weight meets itself
LARGEST = 4 * WIDEST  # a changed weight is cut to this along each axis, and to as many numbers times eight


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of a program, and the number from which it takes its choices."""

    name: str
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Layer:
    """One use of a weight: its stored shape and dtype, what happens to it, its use, what is around (outermost first).

    `tied` takes the weight of the layer before instead. `plainly` uses it in a plain product too, so that it is found
    by that one and whatever else is done to it has to be exact.
    """

    shape: tuple[int, ...]
    use: Piece
    changes: tuple[Piece, ...] = ()
    around: tuple[Piece, ...] = ()
    dtype: str = "float64"
    tied: bool = False
    plainly: bool = False

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (*self.changes, self.use, *self.around)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of parameters and data (T, D); `shown` returns the first weight beside the result."""

    layers: tuple[Layer, ...]
    data: tuple[int, int] = (3, 4)
    rank: int = 2
    shown: bool = False

    def __str__(self) -> str:
        lines = [f"data {self.data}, rank {self.rank}" + (", the first weight is an output" if self.shown else "")]
        for number, layer in enumerate(self.layers):
            said: list[str] = []
            with jax.enable_x64(True):
                shapes = parameters(layer, self.data, said)
            stored = "the weight before" if layer.tied else f"{layer.dtype}{list(shapes['w'])}"
            lines += [f"layer {number}: {stored}", *(f"    {line}" for line in said)]
        return "\n".join(lines)

    def fitting(self, form: Form) -> "Program":
        """The same program with weights that have an axis of the size that a format needs."""
        if not form.name.startswith("Q"):
            return self
        layers = [dataclasses.replace(x, shape=(*x.shape[:-2], *_with(BLOCK, x.shape[-2:]))) for x in self.layers]
        return dataclasses.replace(self, layers=tuple(layers))

    @property
    def names(self) -> set[str]:
        return {piece.name for layer in self.layers for piece in layer.pieces}

    @property
    def reverse_mode(self) -> bool:
        return "while_loop" not in self.names

    @property
    def forward_mode(self) -> bool:
        return "custom_vjp" not in self.names

    @property
    def rounding(self) -> float:
        """What the narrowest dtype through which the program casts a weight rounds off, relative to it."""
        return 2.0**-8 if "cast_bfloat16" in self.names else 2.0**-24 if "cast_narrow" in self.names else 0

    @property
    def tolerance(self) -> float:
        """What a changed order of roundings can do to the result of a program that does not multiply them."""
        return 0.1 if "cast_bfloat16" in self.names else 2e-5 if "cast_narrow" in self.names else 1e-9

    @property
    def unrounded(self) -> "Program":
        """The same program in float64 throughout."""

        def exact(piece):
            return Piece("copy") if piece.name.startswith("cast_") else piece

        layers = (dataclasses.replace(x, changes=tuple(map(exact, x.changes)), dtype="float64") for x in self.layers)
        return dataclasses.replace(self, layers=tuple(layers))


def _with(size: int, matrix: tuple[int, ...]) -> tuple[int, ...]:
    rows, columns = matrix
    return (size, columns) if rows % 2 else (rows, size)


def stored_shape(layer: Layer, inner: tuple[int, ...]) -> tuple[int, ...]:
    """Return a parameter's shape as stored, from that which a use sees in the midst of its stacks."""
    shape = list(inner)
    for piece in reversed(around(layer)):
        if piece.name in STACKS:
            shape.insert(PLACES[piece.number % len(PLACES)] % (len(shape) + 1), STACK)
    return tuple(shape)


def around(layer: Layer) -> list[Piece]:
    """Return the pieces around a use, without those that do not fit what is in them: JAX itself refuses these."""
    kept: list[Piece] = []
    for piece in reversed(layer.around):
        inside = {p.name for p in kept}
        refused = (
            (piece.name in STACKS and layer.tied)
            or (piece.name in ("force", "inner_step") and "while_loop" in inside)
            or (piece.name == "tangent" and "custom_vjp" in inside)
            or (piece.name == "shard_map" and "shard_map" in inside)
            or (piece.name in NOT_RAGGED and layer.use.name == "ragged_dot")
        )
        if not refused:
            kept.insert(0, piece)
    return kept


def innermost(layer: Layer, more: Callable, said: list[str]) -> Callable:
    """Return the use of a layer's weight, without what is around it, as a function of parameters and data."""

    def use(p: Any, x: Any) -> Any:
        count = iter(range(1, 100))

        def scope(piece):
            return Scope(piece.number, x, lambda shape: more(p, f"v{next(count)}", tuple(shape)))

        w = p["w"].astype(jnp.float64)
        plain = flat(jnp.tensordot(widths(x, w.shape[0]), w, 1)) if layer.plainly else None
        for piece in layer.changes:
            w = CHANGES[piece.name](w, s := scope(piece))
            w = w[tuple(slice(LARGEST) for _ in w.shape)] if w.size <= 8 * LARGEST else w.reshape(-1)[: 8 * LARGEST]
            w = w.reshape(1, 1) if w.ndim == 0 else w
            said.append(f"{piece.name} {s.said} -> {list(w.shape)}")
        y = USES[layer.use.name](w, s := scope(layer.use))
        said.append(f"{layer.use.name} {s.said} -> {list(y.shape)}")
        return y if plain is None else y + as_is(plain, y)

    return use


def parameters(layer: Layer, data: tuple[int, int], said: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the stored shapes of a layer's parameters, and say its pieces."""
    shapes = {"w": layer.shape}

    def more(_: Any, key: str, shape: tuple[int, ...]) -> Any:
        shapes[key] = shape
        return jnp.ones(shape)

    w, x = jax.ShapeDtypeStruct(layer.shape, jnp.float64), jax.ShapeDtypeStruct(data, jnp.float64)
    f = innermost(layer, more, inner := [])
    jax.eval_shape(f, {"w": w}, x)
    for piece in around(layer):
        AROUND[piece.name](f, s := Scope(piece.number, None, None))
        said.append(f"in {piece.name} {[c if isinstance(c, bool | int | tuple) else '...' for c in s.said]}")
    said += ["product"] if layer.plainly else []
    said += [line if len(line) < 200 else line[:200] for line in inner]
    return {key: stored_shape(layer, shape) for key, shape in shapes.items()}


def build(program: Program, seed: int = 0) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    """Return a program as a function, with random parameters and data."""
    r = np.random.default_rng(seed)
    params: list[dict[str, Any]] = []
    weights: list[Any] = []
    for layer in program.layers:
        if layer.tied and weights:
            layer = dataclasses.replace(layer, shape=weights[-1].shape)
        shapes = parameters(layer, program.data, [])
        own = {key: r.normal(size=shape) * 0.5 for key, shape in shapes.items()}
        own["w"] = own["w"].astype(layer.dtype)
        if layer.tied and weights:
            del own["w"]
        else:
            weights.append(own["w"])
        params.append(own)
    x = r.normal(size=program.data)

    def fn(params: Any, x: Any) -> Any:
        first, before = params[0]["w"], params[0]
        for layer, own in zip(program.layers, params, strict=True):
            before = own = {"w": before["w"], **own} if "w" not in own else own
            f = innermost(layer, lambda p, key, shape: p[key], [])
            for piece in reversed(around(layer)):
                f = AROUND[piece.name](f, Scope(piece.number, None, None))
            x = jnp.sin(f(own, x))
        return (x, first) if program.shown else x

    return fn, *jax.device_put((params, x))  # which compiles nothing


def adapt(
    program: Program,
    fn: Callable,
    params: Any,
    x: Any,
    form: Form = PLAIN,
    exclude: Sequence[str] = (),
    trained: Sequence[str] = (),
    rows: Mapping[str, Sequence[int]] = MappingProxyType({}),
    of_layers: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[rslora.Lora | None, list[str]]:
    """Wrap a program, every weight of it; return what was said, and None where no weight was found."""
    options: dict[str, Any] = {"targets": ["*"], "exclude": exclude, "trained": trained, "dtype": "float64"}
    options |= {"allow_large_rank": True, "trained_rows": rows, "dropout": form.dropout, **of_layers}
    config = rslora.LoraConfig(rank=program.rank, alpha=ALPHA, method=form.method, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            lora = rslora.wrap(fn, params, x, config=config)
        except ValueError as error:
            if (
                "no weight is left" in str(error)
                or "matches no weight" in str(error)
                or "cannot be adapted as it is used" in str(error)
            ):
                return None, [str(error)]
            raise
    if form.first_alone and len(lora.sites) > 1 and not exclude:
        return adapt(program, fn, params, x, form, list(lora.sites)[1:])
    if form.apart and not of_layers and any(site.stack_axes for site in lora.sites.values()):
        return adapt(program, fn, params, x, form, of_layers=form.of_layers(lora.sites))
    tables = [site for site in lora.sites.values() if has_rows(site)] if form.first_rows and not rows else []
    if tables:
        first, n = tables[0], tables[0].shape[row_axis(tables[0])]
        return adapt(program, fn, params, x, form, exclude=[first.path], rows={first.path: {n - 1, 0}})
    if form.first_whole and not trained:
        return adapt(program, fn, params, x, form, trained=list(lora.sites)[:1])
    return lora, [str(w.message) for w in said if w.category is rslora.RsloraWarning]


def pieces(kinds: dict[str, Callable]) -> st.SearchStrategy[Piece]:
    return st.builds(Piece, st.sampled_from(sorted(kinds)), st.integers(0, 9999))


@st.composite
def programs(draw: Callable, most_layers: int = 2) -> Program:
    """Draw a program."""
    uses = st.one_of(st.builds(Piece, st.just("einsum"), st.integers(0, 9999)), pieces(USES))
    layer = st.builds(
        Layer,
        shape=st.lists(st.sampled_from([4, 6, 3, 2, 1]), min_size=2, max_size=4).map(tuple),
        use=uses,
        changes=st.lists(pieces(CHANGES), max_size=3).map(tuple),
        around=st.lists(pieces(AROUND), max_size=2).map(tuple),
        dtype=st.sampled_from(["float64", "float64", "float64", "float32", "bfloat16"]),
        tied=st.sampled_from([False, False, False, True]),
        plainly=st.sampled_from([True, False, True]),
    )
    layers = tuple(draw(st.lists(layer, min_size=1, max_size=most_layers)))
    if (
        len(layers) > 1 or layers[0].around or layers[0].use.name in TWICE
    ):  # what bfloat16 rounds would grow without bounds on the way

        def narrow(piece):
            return Piece("cast_narrow") if piece.name == "cast_bfloat16" else piece

        layers = tuple(dataclasses.replace(x, changes=tuple(map(narrow, x.changes))) for x in layers)
    return Program(
        layers=layers,
        data=draw(st.sampled_from([(3, 4), (1, 4), (2, 3), (9, 5)])),
        rank=draw(st.sampled_from([2, 3, 5])),
        shown=draw(st.sampled_from([False] * 9 + [True])),
    )


def outcomes(program: Program) -> list[tuple[str, str]]:
    """Return for every layer what became of its weight, "found", "not found" or "fallback", and by which uses."""
    fn, params, x = build(program)
    lora, _ = adapt(program, fn, params, x)
    sites = {} if lora is None else lora.sites
    results, name = [], "0/w"
    for number, own in enumerate(params):
        name = f"{number}/w" if "w" in own else name
        site = sites.get(name)
        kind = "not found" if site is None else "fallback" if site.fallbacks else "found"
        results.append((kind, "" if site is None else ", ".join(site.fallbacks)))
    return results


def alone(name: str, number: int, shape: tuple[int, ...]) -> Program:
    """Return a program of one piece and, where that is no use, the plainest product."""
    piece, plain = Piece(name, number), Piece("einsum", 0)
    if name in USES:
        return Program((Layer(shape, piece),))
    parts = {"changes": (piece,)} if name in CHANGES else {"around": (piece,)}
    return Program((Layer(shape, plain, **parts),))


def main() -> None:
    """Print how often each piece leads to a weight that is not found or that falls back."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=200, help="how many random programs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    by_piece: dict[str, list[collections.Counter]] = {
        name: [collections.Counter(), collections.Counter()] for name in (*CHANGES, *USES, *AROUND)
    }
    causes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)

    @seed(args.seed)
    @settings(max_examples=args.count, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(programs())
    def count(program: Program) -> None:
        for layer, (kind, _) in zip(program.layers, outcomes(program), strict=True):
            for name in {piece.name for piece in layer.pieces}:
                by_piece[name][1][kind] += 1

    with jax.enable_x64(True):
        for name, (by_itself, _) in by_piece.items():
            for number, shape in itertools.product(range(8), ((4, 6), (2, 3, 4))):
                ((kind, why),) = outcomes(alone(name, 7 * number, shape))
                by_itself[kind] += 1
                causes[name].update([why] if why else [])
        count()
    kinds = ("found", "fallback", "not found")
    print(f"{'':20}{'alone':^30}{'in random programs':^30}")
    print(f"{'piece':20}" + "".join(f"{kind:>10}" for kind in kinds * 2) + "  falls back by")
    for name, counts in by_piece.items():
        cells = "".join(f"{counted[kind]:>10}" for counted in counts for kind in kinds)
        print(f"{name:20}{cells}  {', '.join(why for why, _ in causes[name].most_common(2))}")


if __name__ == "__main__":
    main()
