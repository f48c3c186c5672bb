r"""ImageNet 256x256 in the features of DINOv2: a DiT-DH flow becomes a one-step generator.

    python main.py --mode=convert --kind=rae_decoder --source=model.pt,stat.pt,encoder.safetensors \
        --out=rae
    python main.py --mode=encode --source=tfds:imagenet2012 --vae=rae --dtype=float16 --out=features
    python main.py --mode=convert --kind=dit_dh --source=stage2_model.pt --out=dit_dh_xl
    python main.py --config=configs/imagenet256_rae.py --workdir=runs/rae \
        --config.init=dit_dh_xl --config.data.data_dir=features --config.run.vae=rae
    python main.py --config=configs/imagenet256_rae.py:central ...   MF-RAE's difference, no teacher
    python main.py --config=configs/imagenet256_rae.py:S,flow ...    another size: S, B or XL

It is the discrete curriculum in the place of MF-RAE's second stage (arXiv 2511.13019). Missing
here: MF-RAE's first stage, consistency mid-training on a teacher's states, and its teacher in the
target. Without the first, its authors saw XL diverge in the second epoch. We have not run it.

MF-RAE's:

- DiT-DH-XL, batch 256, 36 epochs, no guidance
- two uniform times, moved to noise by sqrt(16 * 16 * 768 / 4096)
- three quarters of the rows with r = t, p = 1, eps = 1e-3
- Adam at 1e-4 with decays .9 and .95, clipping at 1, an average of decay .9999

RAE's (arXiv 2510.11690): label dropout .1.
Ours: the curriculum with K = 6 and q = 2 as in configs/imagenet256.py, the warm-up and the guard.

Scores at stage boundaries:

    --config.run.protocol=adm-imagenet256-latents --config.run.features=inception
    --config.run.reference=VIRTUAL_imagenet256_labeled.npz --config.run.score_samples=5000

To try the code path:

    --config.data.mock --config.curriculum.length_unit=steps --config.curriculum.length=12
    --config.batch_size=8 --config.run.sample_rows=2
    --config.guard.action=off --config.guard.every_steps=0
"""

import math

from configs import methods
from dmf.config import complete
from dmf.errors import DmfError
from dmf.networks import DIT_DH_SIZES

SIDE, CHANNELS = 16, 768  # of a latent


def get_config(argument: str = ""):
    """The config with the size and the methods named in the argument, in any order."""
    names = methods.names_in(argument, "imagenet256_rae.py", DIT_DH_SIZES)
    sizes = [name for name in names if name in DIT_DH_SIZES] or ["XL"]
    if len(sizes) > 1:
        raise DmfError(
            f"configs/imagenet256_rae.py:{argument}: expected one size of {', '.join(DIT_DH_SIZES)}"
        )
    config = complete(
        dict(
            seed=0,
            batch_size=256,
            label_dropout=0.1,
            network=dict(kind="dit_dh", **DIT_DH_SIZES[sizes[0]], num_classes=1000),
            data=dict(name="imagenet256_features", flip=True),
            times=dict(
                pairing="sorted",
                base="uniform",
                r_neq_t_fraction=0.25,
                shift=math.sqrt(SIDE * SIDE * CHANNELS / 4096),
            ),
            loss=dict(p=1.0, eps=1e-3, product_rule=1.0, residual_scale="raw"),
            curriculum=dict(stages=6, q=2.0, interval="dagger", length=36.0, length_unit="epochs"),
            optimizer=dict(learning_rate=1e-4, warmup_steps=1000, b1=0.9, b2=0.95, clip_norm=1.0),
            # decays .999 and .9999 per step of 256 images
            ema=dict(halflife_images=(177.4e3, 1.774e6), rampup_ratio=0.05, evaluate=1.774e6),
            guard=dict(every_steps=2000, action="jvp"),
            run=dict(
                log_every_steps=100,
                checkpoint_every_steps=1000,
                score_samples=0,
                score_steps=(1, 2, 50),
            ),
        )
    )
    chosen = [name for name in names if name not in DIT_DH_SIZES]
    return methods.apply(config, chosen, "imagenet256_rae.py")
