"""What adapters and base of a random program are made of, and what then acts in place of each weight, by hand."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rslora_jax as rslora
from rslora_jax.methods import method_of
from rslora_jax.sites import from_paths, named_leaves
from rslora_jax.stored import dense
from tests.methods.gained import Gained
from tests.random_programs.formats import FORMATS
from tests.stored.blocks import Blocks, blocks
from tests.stored.eight_bits import EightBits

ALPHA = 5
DORA = method_of("dora")


@dataclasses.dataclass(frozen=True)
class Form:
    """A method, how weights of two axes or more are stored, and what the first of them, or single layers, are apart in.

    The first alone may be adapted (`first_alone`), or trained whole, and the first table have trained rows; layers may
    have ranks and scales of their own.
    """

    method: Any = "lora"
    stored: Callable[[Any], Any] | None = None
    first_alone: bool = False
    first_whole: bool = False
    first_rows: bool = False
    apart: bool = False
    dropout: float = 0.0
    name: str = ""  # of the format

    def of_layers(self, sites: Mapping[str, rslora.Site]) -> dict[str, Any]:
        """Return options that give layers ranks and alphas of their own, and one of three or more none."""
        own = {
            f"{path}/{{{n}}}".lstrip("/"): layer
            for path, site in sites.items()
            for n, layer in enumerate(of_layers(site))
        }
        ranks, alphas = ({path: layer[k] for path, layer in own.items() if layer[0]} for k in (0, 1))
        gone = [path for path, layer in own.items() if not layer[0]]
        return {"rank_pattern": ranks, "alpha_pattern": alphas, "exclude": gone}

    def fresh(self, site: rslora.Site, r: np.random.Generator, w: Any = None) -> dict[str, np.ndarray]:
        """Draw the arrays of an adapter that changes nothing of a weight."""
        shapes = site.factor_shapes
        if site.kind == "trained":
            return {"value": np.asarray(w, np.float64)}
        if "rows" in shapes:
            return {"rows": np.moveaxis(np.asarray(w, np.float64), row_axis(site), 0)[list(site.method.ids)]}
        start = {"a": r.normal(size=shapes["a"]), "b": np.zeros(shapes["b"])}
        if self.method == "dora":
            norms = np.sqrt(np.sum(np.square(np.asarray(w, np.float64)), site.in_axes))
            kept = [n for n in range(len(site.shape)) if n not in site.in_axes]
            return start | {"m": norms.transpose([kept.index(n) for n in (*site.stack_axes, *site.out_axes)])}
        return start | ({"m": np.ones(shapes["m"])} if "m" in shapes else {})

    def held(self, params: Any) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
        """Return what is differentiated of some parameters, and how they are had from it: held, and as arrays.

        A weight that is stored has its scales for a derivative, and its codes have none.
        """
        if self.stored is None:
            return params, lambda params: params, lambda params: params
        leaves = named_leaves(params)
        packed = {path: self.stored(w) if eligible(w) else w for path, w in leaves.items()}

        def held(loose: Any) -> Any:
            return from_paths(params, {path: with_floating(w, loose[path]) for path, w in packed.items()})

        def arrays(loose: Any) -> Any:
            return from_paths(params, {path: by_hand(w) for path, w in named_leaves(held(loose)).items()})

        return {path: list(filter(is_floating, jax.tree.leaves(w))) for path, w in packed.items()}, held, arrays


def of_layers(site: rslora.Site) -> list[tuple[int, float]]:
    """Return the rank and the alpha that layers are to have, by hand."""
    count = 0 if site.layer_axis is None else site.shape[site.layer_axis]
    return [(0 if n == 1 and count > 2 else 1 + n % 3, 3.0 + n) for n in range(count)]


def is_floating(w: Any) -> bool:
    return jnp.issubdtype(w.dtype, jnp.floating)


def with_floating(w: Any, given: Any) -> Any:
    """Return a weight with other floating arrays in place of its own, in their order."""
    given = iter(given)
    return jax.tree.map(lambda own: next(given) if is_floating(own) else own, w)


def eligible(w: Any) -> bool:
    return w.ndim >= 2 and is_floating(w)


def eight_bits(w: Any) -> EightBits:
    """Round a weight to 8 bits, with scales of its own dtype."""
    scale = (jnp.maximum(jnp.abs(w).max(-2, keepdims=True), 0.1) / 100).astype(w.dtype)
    return EightBits(jnp.round(w / scale).astype(jnp.int8), scale, jnp.dtype(w.dtype))


def matrices(w: Any) -> Blocks:
    """Round a weight to blocks, each of one matrix of a stack."""
    return blocks(w, w.ndim - 2, 2)


def by_hand(w: Any) -> Any:
    """Return what a stored weight stands for, from its arrays; an array as it is.

    The numbers of the package's formats are compared with independent ones in `tests/stored/test_formats.py`.
    """
    if not isinstance(w, EightBits | Blocks):
        return dense(w)
    wide = jnp.promote_types(w.scale.dtype, jnp.float32)
    return jnp.reshape(w.codes * w.scale.astype(wide), w.shape).astype(w.dtype)


PLAIN = Form()
FORMS = [
    Form(Gained()),
    Form(stored=eight_bits),
    Form(stored=matrices),
    Form(stored=blocks),
    Form(stored=eight_bits, first_alone=True),
    Form(Gained(), stored=eight_bits),
    Form(Gained(), stored=matrices, first_alone=True),
    Form("dora"),
    Form("dora", stored=eight_bits),
    Form(apart=True),
    Form("dora", apart=True),
    Form(stored=eight_bits, apart=True),
    Form(first_whole=True),
    Form("dora", stored=eight_bits, first_whole=True),
    Form(first_rows=True),
]
# And what is made of each of the package's own formats: the first twice, as it is the commonest.
HOW = [
    *({}, {}, {"method": "dora"}, {"first_whole": True}, {"first_rows": True}, {"apart": True}),
    *({"method": "dora", "apart": True}, {"first_alone": True}, {"method": "dora", "first_whole": True}),
]
PACKED = [Form(stored=FORMATS[name], **how, name=name) for name in FORMATS for how in HOW]
DROPPED = [dataclasses.replace(form, dropout=0.3) for form in PACKED]


def row_axis(site: rslora.Site) -> int:
    return (site.in_axes if site.kind == "embedding" else site.out_axes)[0]


def has_rows(site: rslora.Site) -> bool:
    """Say whether a weight is a table or a head, of which rows can be trained."""
    axes = site.in_axes if site.kind == "embedding" else site.out_axes
    return site.kind in ("embedding", "linear") and not site.stack_axes and len(axes) == 1


def acting(lora: rslora.Lora, params: Any, adapters: Any, off: Any) -> Any:
    """Return m * (W + alpha / sqrt(r) A B) from the definition, with nothing of the package but the sites' axes.

    Of DoRA the columns have norm one before m.
    Every number of it is then put off by `off`, relative to it, some up and some down.
    """

    def one(site: rslora.Site, w: Any) -> Any:
        own = adapters[site.path]
        if site.kind == "trained":
            return (own["value"] * (1 + off * np.random.default_rng(2).choice([-1, 1], w.shape))).astype(w.dtype)
        if "rows" in own:
            rows = jnp.moveaxis(w.astype(jnp.float64), row_axis(site), 0).at[jnp.asarray(site.method.ids)]
            total = jnp.moveaxis(rows.set(own["rows"]), 0, row_axis(site))
            return total * (1 + off * np.random.default_rng(2).choice([-1, 1], w.shape))
        letters = "abcdefghij"[: w.ndim]

        def of(axes):
            return "".join(letters[n] for n in axes)

        a, b = of(site.stack_axes + site.in_axes) + "z", of(site.stack_axes) + "z" + of(site.out_axes)
        scale, layers = ALPHA / np.sqrt(site.rank), of_layers(site) if lora.config.rank_pattern else []
        if layers:
            sizes = [-1 if n == site.layer_axis else 1 for n in range(w.ndim)]
            scale = np.reshape([alpha / np.sqrt(rank) if rank else 0.0 for rank, alpha in layers], sizes)
            counts = np.reshape([np.arange(site.rank) < rank for rank, _ in layers], [len(layers), site.rank])
            own = {**own, "a": jnp.einsum(f"{a},{letters[site.layer_axis]}z->{a}", own["a"], counts)}
        update = jnp.einsum(f"{a},{b}->{letters}", own["a"], own["b"])
        total = w.astype(jnp.float64) + scale * update
        if site.method == DORA:
            norm = jnp.sqrt(jnp.sum(jnp.square(total), site.in_axes, keepdims=True))
            total = total / jax.lax.stop_gradient(norm)
        if "m" in own:
            total = jnp.einsum(f"{letters},{of(site.stack_axes + site.out_axes)}->{letters}", total, own["m"])
        if layers:
            total = jnp.where(np.reshape([rank > 0 for rank, _ in layers], sizes), total, w)
        return total * (1 + off * np.random.default_rng(2).choice([-1, 1], w.shape))

    leaves = named_leaves(params)
    return from_paths(params, leaves | {path: one(site, leaves[path]) for path, site in lora.sites.items()})
