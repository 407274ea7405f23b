"""Sections that the configs of all stages share, and how a config is read from the command line.

`configs/*.py` start from `base(stage, variant)` and set what is their own. Every key has a reader.
"""

from typing import Any

from ml_collections import ConfigDict

from instella_jax.errors import UserError

VARIANTS = {"": 64, "instella_512": 512, "instella_768": 768, "instella_1024": 1024}


# An ml_collections.ConfigDict, whose keys no type checker can know.
Config = Any


def base(stage: str, variant: str) -> Config:
    """Return the sections that every stage has.

    Args:
      stage: "tokenizer", "diffusion" or "ar".
      variant: "" for the demo, "instella_512", "instella_768" or "instella_1024" for the published
        recipe.

    Raises:
      UserError: the variant is unknown.
    """
    if variant not in VARIANTS:
        names = ", ".join(name for name in VARIANTS if name)
        raise UserError(f"unknown variant {variant!r}: expected none (the demo), {names}")
    published = bool(variant)
    return ConfigDict(
        dict(
            stage=stage,
            seed=0,
            # Steps that a profiler trace in WORKDIR/profile records; 0 for none.
            profile=0,
            # Devices on each axis; -1 is "the rest". dcn_data is over slices of TPUs, or nodes.
            mesh=dict(dcn_data=1, data=-1, fsdp=1, tensor=1),
            # How networks are computed; see models.layers.Execution.
            run=dict(
                param_dtype="float32",
                dtype="bfloat16" if published else "float32",
                output_dtype="float32",
                unroll=not published,
                remat="dots" if published else "none",
                attention="auto",
                # Devices to make of a CPU; 0 for one per core, as far as the batch splits.
                cpu_devices=0,
            ),
            # A model folder whose weights training starts from; "" for random ones.
            init_from="",
            # The shipped weights that sampling and evaluation use without a workdir.
            shipped="" if published else f"demo_{stage}",
            data=data(VARIANTS[variant], "folder" if published else "scenes"),
            optimizer=dict(
                # "adamw", or "muon" for the kernels of the blocks and AdamW for the rest.
                kind="adamw",
                learning_rate=1e-4,
                warmup_steps=1_000,
                schedule="constant",
                final_fraction=0.1,
                b1=0.9,
                b2=0.999,
                eps=1e-8,
                weight_decay=0.0,
                clip=1.0,
                # The peak of its own learning rate, which follows the same schedule; steps of the
                # Newton-Schulz iteration that makes its updates orthogonal; layers that are left
                # to AdamW, by name.
                muon=dict(learning_rate=0.02, momentum=0.95, ns_steps=5, exclude=()),
            ),
            train=dict(
                steps=100_000,
                batch_size=4_096 if published else 64,
                accumulate=1,
                # Steps in one call of the compiled function: spares small models the dispatch.
                steps_per_call=1,
                ema_decay=0.9999,
                # A gradient norm over this skips the step; 0 turns it off.
                spike_norm=0.0,
                # Skipped steps in a row that end the run.
                max_skipped=100,
                log_every=100,
                eval_every=2_500,
                save_every=2_500,
                image_every=2_500,
                # The newest checkpoints stay, so many of them. Others stay as well: those of steps
                # that are multiples of keep_every (0: none), one of each keep_minutes (0:
                # none), and the best by the held-out metric keep_best, such as "loss" ("": none).
                keep=10,
                keep_every=0,
                keep_minutes=0.0,
                keep_best="",
            ),
            eval=dict(batch_size=64, batches=8, pictures=16),
            # What --mode=plan reckons with: a chip of flops.CHIPS, how many, the memory of one in
            # GB (0: the chip's own), and the share of its peak that is reached: 0.22 gives the
            # published run's 220 images/s on each MI300X.
            plan=dict(chip="MI300X", devices=8, memory_gb=0.0, utilisation=0.22),
        )
    )


def data(image_size: int, kind: str) -> dict:
    """Return the data section: what is read and at what size (pixels)."""
    return dict(
        kind=kind,
        image_size=image_size,
        # Shapes that the tokenizer trains on, HEIGHTxWIDTH with commas between them, such as
        # "512x512,384x640,640x384"; "" is image_size, square. See data.buckets.
        buckets="",
        seed=0,
        # Processes that prepare data; 0 for threads of this one.
        workers=0 if kind == "scenes" else 8,
        scenes=dict(concepts="core", styles=("twemoji",), places="snapped", max_objects=3),
        # Several folders, with commas between them, are mixed by weights such as "3:1" ("" is by
        # their sizes).
        folder=dict(path="", weights="", heldout=0.02, min_keep=0.8, flip=0.5),
        # What `instella-jax data import` makes.
        shards=dict(path="", weights="", heldout=0.02, min_keep=0.8, flip=0.5),
        # What `instella-jax data encode` makes of them.
        codes=dict(path="", weights="", heldout=0.02),
    )


def generator(variant: str) -> dict:
    """Return the sections that both generators have beside `base`."""
    published = dict(num_layers=16, num_heads=16, head_dim=128, num_tokens=128, bits=64)
    demo = dict(num_layers=4, num_heads=4, head_dim=32, num_tokens=16, bits=32)
    shared: dict[str, Any] = dict(
        model=published if variant else demo,
        # Standard deviation of the initial position embeddings; 0 as published.
        pos_emb_std=0.0 if variant else 0.5,
        # Model folder of the image tokenizer; "demo" is the shipped one.
        tokenizer="" if variant else "demo",
        text=dict(
            # Folder with a text tokenizer and, unless it is trained here, the weights; "demo" is
            # the shipped one.
            encoder="" if variant else "demo",
            trainable=False,
            max_length=128 if variant else 28,
            # models.olmo.OlmoConfig
            model=dict(
                vocab_size=50_304 if variant else 384,
                hidden_size=2_048 if variant else 64,
                intermediate_size=8_192 if variant else 128,
                num_hidden_layers=16 if variant else 4,
                num_attention_heads=16 if variant else 4,
                num_key_value_heads=16 if variant else 4,
                rope_theta=10_000.0,
                clip_qkv=0.0,
            ),
        ),
        # Adapters that are trained in the place of the generator, which stays as `init_from` or the
        # shipped weights have it; rank 0 trains the generator. Targets are layers by the ends of
        # their published names.
        lora=dict(
            rank=0,
            alpha=16.0,
            targets=(
                *("q_proj", "k_proj", "v_proj", "o_proj"),
                *("proj_cond", "net.0.proj", "net.2"),
            ),
        ),
        sample=dict(
            # One prompt, or a text file with one prompt a line.
            prompt="",
            prompts_file="",
            negative_prompt="",
            # g in (1 + g) * conditional - g * unconditional; 0 is no guidance.
            guidance=1.0,
            temperature=1.0,
            # Picture j of a prompt has seed + j.
            seed=0,
            images_per_prompt=1,
            # Pixels; 0 is the size that the model was trained at.
            height=0,
            width=0,
            # Pictures sampled at a time.
            batch_size=16,
            # What samples the bits: "xla", "pallas" (TPU and GPU), or "auto", the faster one.
            kernel="auto",
            # Folder for the PNG files; "" is "drawn", in the workdir where one is given.
            out="",
        ),
    )
    # A mirrored picture belies a caption that says left or right.
    sections: dict[str, Any] = dict(folder=dict(flip=0.0), shards=dict(flip=0.0))
    shared["data"] = sections
    # Folder with precomputed codes of the first training scenes (tools/encode_scenes.py); "demo" is
    # the shipped one. Where it is "", or its codes are of other scenes or of another tokenizer,
    # each step renders and encodes new ones.
    sections["scenes"] = dict(codes="")
    if not variant:
        # As many places as captions can tell apart: with more, a prompt leaves too much open.
        sections["scenes"] = dict(places="thirds", codes="demo")
        shared["train"] = dict(
            batch_size=32, steps_per_call=10, ema_decay=0.99, keep=2, log_every=50
        )
        shared["optimizer"] = dict(
            kind="muon", muon=dict(learning_rate=0.02, momentum=0.95, ns_steps=3),
            learning_rate=2.5e-3, warmup_steps=100, b2=0.98, schedule="cosine", final_fraction=0.02,
        )  # fmt: skip
    return shared
