"""What the stages of both generators share: frozen tokenizer, text encoder, caption dropout.

Axes: B batch, R rows of which the network sees `draws` for each in the batch, N latent tokens,
K bits, L text length, Dt text width.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from instella_jax.config import Config
from instella_jax.data import codes
from instella_jax.data.sources import make_split, part_paths
from instella_jax.errors import UserError
from instella_jax.models import lora
from instella_jax.models.functional import Network, Params, Trainable, apply
from instella_jax.models.olmo import Olmo
from instella_jax.models.pixels import to_float
from instella_jax.models.quantizers import hard_code
from instella_jax.models.text import TextTokenizer
from instella_jax.models.tokenizer import TokenizerNetwork
from instella_jax.stages.base import Batch, Metrics
from instella_jax.stages.precomputed_codes import find_scene_codes
from instella_jax.weights import lora_files, model_folder, model_parts


class GeneratorStage(abc.ABC):
    """A generator with its text encoder, trained on the codes of a frozen tokenizer.

    Trainable: {"generator": ...} and, with `text.trainable`, {"text": ...}; with `lora.rank` only
    adapters of a generator that is frozen, {"lora": ...}.
    """

    kind: str
    # Which of the settings of `sample` a model folder keeps as the model's own.
    sampling_settings: tuple[str, ...] = ("guidance", "temperature")

    def __init__(self, config: Config, network: type):
        """Build the networks.

        Args:
          config: a config of a generator.
          network: the class of the generator.

        Raises:
          UserError: sizes do not fit each other, or a model folder cannot be used.
        """
        self.config = config
        run = model_folder.execution(config.run)
        self.text_sizes = model_parts.text_sizes(config.text.model)
        self.text_network = Olmo(self.text_sizes, run)
        self.network = network(
            **config.model,
            text_width=self.text_sizes.hidden_size,
            run=run,
            pos_emb_std=config.pos_emb_std,
        )
        layers = self.text_sizes.num_hidden_layers
        if layers != config.model.num_layers:
            raise UserError(
                f"the generator has {config.model.num_layers} blocks and the text encoder "
                f"{layers}: block i reads layer i, so they must be equal"
            )
        self.run = run
        self.adapters = self._make_adapters()

    def _make_adapters(self) -> lora.Adapters | None:
        """Return the adapters that are trained in the place of the generator, if any."""
        settings = self.config.get("lora")  # which a run of before has not
        if not settings or not settings.rank:
            return None
        if self.config.text.trainable:
            raise UserError(
                "lora.rank trains adapters of the generator alone: set text.trainable to False, or "
                "lora.rank to 0"
            )
        return lora_files.make_adapters(
            self.network, settings.rank, settings.alpha, settings.targets, self.run.param_dtype
        )

    @property
    def base_folder(self) -> Path:
        """Folder of the generator that adapters are trained on.

        Raises:
          UserError: none is given.
        """
        return model_folder.find_weights(self.config)

    def adapted(self, params: Params) -> Params:
        """Return parameters by part with the adapters in their places in the generator."""
        if self.adapters is None:
            return params
        generator = lora.adapt(params["generator"], params["lora"], self.adapters.scale)
        return {**params, "generator": generator}

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the image tokenizer."""
        return model_folder.find(self.config.tokenizer, "tokenizer")

    @property
    def text_folder(self) -> Path:
        """Folder of the text tokenizer, and of the text encoder's weights if it is frozen."""
        return model_folder.find(self.config.text.encoder, "text.encoder")

    @functools.cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """What cuts captions into ids; one for all loaders, so that warnings come once.

        Raises:
          UserError: it cannot be read, or has more tokens than the text encoder.
        """
        tokenizer = TextTokenizer.from_folder(self.text_folder)
        if tokenizer.vocab_size > self.text_sizes.vocab_size:
            raise UserError(
                f"the text tokenizer of {self.text_folder} has {tokenizer.vocab_size} tokens, "
                f"text.model only {self.text_sizes.vocab_size}"
            )
        return tokenizer

    @functools.cached_property
    def tokenizer_network(self) -> TokenizerNetwork:
        """Return the image tokenizer that the codes come from.

        Raises:
          UserError: its code does not have the generator's shape.
        """
        model = self.config.model
        sizes = model_folder.code_sizes(self.config.tokenizer, model.num_tokens, model.bits)
        size = self.config.data.image_size
        sizes.grid(size, size)
        return TokenizerNetwork(sizes, self.run)

    @property
    def critics(self) -> dict[str, Any]:
        return {}

    @property
    def networks(self) -> Mapping[str, Trainable]:
        """The generator, and the text encoder where it is trained along; or the adapters."""
        if self.adapters is not None:
            return {"lora": self.adapters}
        trained: dict[str, Network] = {"generator": self.network}
        if self.config.text.trainable:
            trained["text"] = self.text_network
        return trained

    def describe_process(self) -> dict[str, Any]:
        """Return what sampling must know beside the sizes."""
        return {}

    @property
    def draws(self) -> int:
        """How many rows the network sees of each picture in training."""
        return 1

    @abc.abstractmethod
    def code_metrics(
        self,
        params: Params,
        code: Float[Array, "B N K"],
        text: Float[Array, "layers B L Dt"],
        mask: Bool[Array, "R L"],
        key: Key[Array, ""],
        train: bool,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return loss and metrics of codes under text features."""

    @property
    def frozen_networks(self) -> dict[str, Network]:
        """The image tokenizer, unless codes are given, and what is not trained of the rest."""
        networks: dict[str, Network] = {}
        if self.adapters is not None:
            networks["generator"] = self.network
        if self.config.data.kind != "codes":
            networks["tokenizer"] = self.tokenizer_network
        if not self.config.text.trainable:
            networks["text"] = self.text_network
        return networks

    def frozen(self) -> Params:
        """Return parameters of the frozen networks, from their folders.

        Raises:
          UserError: a folder lacks them, or has them in other sizes than the config's.
        """
        loaded, sizes = {}, self.describe()
        for part, network in self.frozen_networks.items():
            folder, name = self.tokenizer_folder, part
            if part == "text":
                folder = self.text_folder
                model_parts.matching_part(folder, part, sizes[part], "text.model")
            elif part == "generator":
                folder = self.base_folder
                name = model_parts.matching_part(folder, part, sizes[part], "model")
                model_parts.check_target(folder, sizes)
            loaded[part] = model_folder.load_boxed(folder, name, network, self.run.param_dtype)
        return loaded

    def loader(self, split: str, **options: Any) -> Any:
        """Return batches with "image" or packed "code", "text", "ids" and "mask"."""
        if self.config.data.kind == "codes":
            self.check_codes()
        precomputed = None
        if split == "train" and self.config.data.kind == "scenes":
            precomputed = self.scene_codes(tell=options.get("process_index", 0) == 0)
        return make_split(
            self.config.data,
            split,
            captions=True,
            text_tokenizer=self.text_tokenizer,
            max_length=self.config.text.max_length,
            scene_codes=precomputed,
            **options,
        )

    def scene_codes(self, tell: bool) -> Path | None:
        """Return the folder of the codes of training scenes, None where each step encodes them.

        Args:
          tell: whether to print that those of the config are not of its scenes.

        Raises:
          UserError: they, or the tokenizer, cannot be read.
        """
        _ = self.tokenizer_network  # which checks that there is one, and the shape of its code
        found = find_scene_codes(self.config)
        if tell and found is None and self.config.data.scenes.codes:
            print(
                "each step renders and encodes its scenes: the codes of data.scenes.codes are of "
                "other scenes or of another tokenizer",
                flush=True,
            )
        return found

    def check_codes(self) -> None:
        """Check that the codes are those of the generator and of the tokenizer that decodes them.

        Raises:
          UserError: they are not, or pictures are wanted and there is no tokenizer.
        """
        config = self.config
        folder = None
        if config.eval.pictures or config.tokenizer:
            _ = self.tokenizer_network  # which checks the shape of its code
            folder = self.tokenizer_folder
        for path in part_paths(config.data):
            codes.check_dataset(
                path, config.model.num_tokens, config.model.bits, config.data.image_size, folder
            )

    def text_features(
        self, params: Params, frozen: Params, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]
    ) -> Float[Array, "layers B L Dt"]:
        """Return what the blocks of the generator see, one layer each."""
        weights = params if self.config.text.trainable else frozen
        return apply(self.text_network, weights["text"], ids, mask)[1:]

    def code_of(self, frozen: Params, batch: Batch) -> Float[Array, "B N K"]:
        """Return the codes of a batch, given or made of its pictures."""
        if "code" in batch:
            sizes = self.config.model
            return codes.unpack_bits(batch["code"], sizes.num_tokens, sizes.bits)
        return self.encode(frozen, batch["image"])

    def encode(
        self, frozen: Params, images: UInt8[Array, "B height width 3"]
    ) -> Float[Array, "B N K"]:
        """Return the codes of pictures, without gradients."""
        network, pictures = self.tokenizer_network, to_float(images)
        logits = apply(network, frozen["tokenizer"], pictures, method="encode")
        return jax.lax.stop_gradient(hard_code(logits.astype(jnp.float32)))

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        key: Key[Array, ""],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss with captions dropped at the configured rate."""
        del step
        drop_key, key = jax.random.split(key)
        mask = jnp.repeat(batch["mask"], self.draws, axis=0)
        keep = jax.random.uniform(drop_key, mask.shape[:1]) >= self.config.loss.caption_dropout
        return self._metrics(params, frozen, batch, mask & keep[:, None], key, True)

    def evaluate(
        self, params: Params, frozen: Params, batch: Batch, key: Key[Array, ""]
    ) -> Metrics:
        """Return loss and bit accuracy with every caption in place."""
        loss, metrics = self._metrics(params, frozen, batch, batch["mask"], key, False)
        return {"loss": loss, **metrics}

    def _metrics(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        mask: Bool[Array, "R L"],
        key: Key[Array, ""],
        train: bool,
    ) -> tuple[Float[Array, ""], Metrics]:
        code = self.code_of(frozen, batch)
        # The encoder sees the caption even where it is dropped: its states are masked later.
        text = self.text_features(params, frozen, batch["ids"], batch["mask"])
        params = self.adapted({**frozen, **params})
        return self.code_metrics(params, code, text, mask, key, train)

    def describe(self) -> dict[str, Any]:
        """Return sizes of the generator and the text encoder, how to sample, the picture size."""
        return {
            "generator": {"kind": self.kind, **self.config.model.to_dict()},
            "text": {
                **dataclasses.asdict(self.text_sizes),
                "max_length": self.config.text.max_length,
            },
            **self.describe_process(),
            "sampling": {name: self.config.sample[name] for name in self.sampling_settings},
            "image_size": self.config.data.image_size,
        }
