"""The optimizer and its learning rate over the steps."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax import contrib

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.runtime.sharding import share_layers


def make_schedule(config: Config, steps: int, peak: float | None = None) -> optax.Schedule:
    """Return linear warm-up, then constant or a cosine down to `final_fraction` of the peak.

    Args:
      config: the `optimizer` section.
      steps: where the cosine ends.
      peak: the highest rate; None for `learning_rate`.
    """
    peak = float(config.learning_rate if peak is None else peak)
    if config.schedule == "constant":
        if not config.warmup_steps:  # for which optax's warm-up stays at 0
            return optax.constant_schedule(peak)
        return optax.warmup_constant_schedule(0.0, peak, config.warmup_steps)
    return optax.warmup_cosine_decay_schedule(
        0.0,
        peak,
        config.warmup_steps,
        max(steps, config.warmup_steps + 1),
        end_value=peak * config.final_fraction,
    )


def learning_rate(config: Config, steps: int, opt_state: Any) -> jax.Array:
    """Return the learning rate of the next update, by the state of the optimizer.

    The schedule goes by the updates: a step that is skipped is none.
    """
    (_, updates), *_ = optax.tree.get_all_with_path(opt_state, "count")
    return jax.numpy.asarray(make_schedule(config, steps)(updates), jax.numpy.float32)


def make_optimizer(
    config: Config, steps: int, critics: Mapping[str, optax.GradientTransformation] | None = None
) -> optax.GradientTransformation:
    """Return the optimizer that `optimizer.kind` names, after a clip of the gradient norm where
    `clip` is not 0.

    "adamw" treats all parameters alike. "muon" takes the kernels of the stacked blocks, whose
    momentum it orthogonalises layer by layer, and leaves the rest to AdamW, as well as the layers
    named in `muon.exclude`.

    Args:
      config: the `optimizer` section.
      steps: where the schedule ends.
      critics: optimizers of parts that have their own; see `Stage.critics`.
    """
    if critics:

        def part(path: tuple[Any, ...], leaf: Any) -> str:
            del leaf
            return path[0].key if path[0].key in critics else "model"

        rules: dict[Any, Any] = {**critics, "model": make_optimizer(config, steps)}
        return optax.partition(rules, lambda tree: jax.tree_util.tree_map_with_path(part, tree))
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    if config.kind == "adamw":
        return optax.chain(clip, _adamw(config, steps))
    kinds: dict[Any, Any] = {"muon": _muon(config, steps), "adamw": _adamw(config, steps)}
    exclude = frozenset(config.muon.exclude)
    return optax.chain(clip, optax.partition(kinds, lambda tree: _kind_of_each(tree, exclude)))


def _adamw(config: Config, steps: int) -> optax.GradientTransformation:
    return optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def _muon(config: Config, steps: int) -> optax.GradientTransformation:
    """Return Muon (Jordan et al., 2024) for kernels [layers, fan_in, fan_out].

    Updates are scaled by sqrt(max(1, fan_out / fan_in)), so that one learning rate serves several
    widths.
    """
    orthogonalise = functools.partial(_orthogonalise, ns_steps=config.muon.ns_steps)
    return optax.chain(
        optax.trace(config.muon.momentum, nesterov=True),
        optax.stateless(lambda updates, _: share_layers(orthogonalise, updates)),
        optax.stateless(lambda updates, _: jax.tree.map(_scale_for_width, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(make_schedule(config, steps, config.muon.learning_rate)),
    )


def _orthogonalise(tree: Any, ns_steps: int) -> Any:
    # Without a momentum of its own, since each device of a mesh sees its layers alone.
    muon = contrib.scale_by_muon(
        ns_steps=ns_steps,
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers=_stacked_matrices,
    )
    orthogonal, _ = muon.update(tree, muon.init(tree))
    return orthogonal


def _scale_for_width(update: jax.Array) -> jax.Array:
    _, fan_in, fan_out = update.shape
    return update * max(1.0, fan_out / fan_in) ** 0.5


def _stacked_matrices(tree: Any) -> Any:
    # Axis 0 counts the layers.
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers((1,), (2,)), tree)


def _kind_of_each(params: Any, exclude: frozenset[str]) -> Any:
    """Return "muon" or "adamw" for each parameter, with its logical axes or without.

    Args:
      params: the parameters, or their shapes.
      exclude: layers whose kernels are not Muon's.

    Raises:
      UserError: one of these is no layer whose kernels would be.
    """
    layers: set[str] = set()

    def kind(path: tuple[Any, ...], leaf: Any) -> str:
        names = {key.key for key in path if isinstance(key, jax.tree_util.DictKey)}
        if "kernel" not in names or leaf.ndim != 3:
            return "adamw"
        layers.update(names)
        return "adamw" if names & exclude else "muon"

    kinds = jax.tree_util.tree_map_with_path(kind, params)
    if layers and not exclude <= layers:
        wrong, right = sorted(exclude - layers), sorted(layers - {"kernel"})
        raise UserError(
            f"optimizer.muon.exclude has {', '.join(wrong)}, which Muon does not train here: "
            f"expected some of {', '.join(right)}"
        )
    return kinds
