r"""ImageNet 256x256 in the latents of the SD autoencoder: SiT-XL/2 to a one-step generator by the discrete MeanFlow curriculum.

    python main.py --mode=convert --kind=sit --source=SiT-XL-2-256x256.pt --out=sit_xl2
    python main.py --mode=encode --source=tfds:imagenet2012 --vae=sd_vae --out=latents
    python main.py --config=configs/imagenet256.py --workdir=runs/imagenet256 --config.init=sit_xl2 \
        --config.data.data_dir=latents
    python main.py --config=configs/imagenet256.py:B ...     another size of SiT: S, B, L or XL

Cost: the paper's best run is 48 epochs = 60,000 steps of batch 1024; it reports 1.71 s per step on 4 H100 (114 GPU-hours) and
one-step FID 14.53 without guidance (the SiT it starts from: 11.52 with 50 steps). We have not run it. To try the code path, add
--config.data.mock --config.curriculum.length_unit=steps --config.curriculum.length=12 --config.batch_size=8
--config.run.sample_rows=2 --config.guard.action=off --config.guard.every_steps=0.
Scores at stage boundaries: --config.run.protocol=adm-imagenet256-latents
--config.run.features=inception --config.run.reference=VIRTUAL_imagenet256_labeled.npz
--config.run.vae=sd_vae --config.run.score_samples=5000.

The paper's: SiT-XL/2, dagger, no guidance, batch 1024, equal stages, 48 epochs (96 diverged in its fifth stage).
Unknown in the paper: K (6 here, which never gets finer than d = 1/16), q (2), and, here from the official MeanFlow recipe for
ImageNet, the law of (r, t), p, eps, Adam 1e-4 (.9, .95), label dropout. Clipping at 1, the EMAs and the guard are ours.
"""

from dataclasses import asdict

from dmf.config import complete
from dmf.errors import DmfError
from dmf.method.flow import TIME_LAWS
from dmf.networks import DIT_SIZES

VARIANTS = ("XL", "L", "B", "S")


def get_config(variant: str = "XL"):
    if variant not in VARIANTS:
        raise DmfError(f"configs/imagenet256.py:{variant}: expected one of {', '.join(VARIANTS)}")
    return complete(
        dict(
            seed=0,
            batch_size=1024,
            label_dropout=0.1,
            network=dict(
                kind="dit", **DIT_SIZES[variant], patch=2, num_classes=1000, interval_init="zero"
            ),
            data=dict(name="imagenet256_latents", flip=True),
            times=asdict(TIME_LAWS["imagenet"]),
            loss=dict(p=1.0, eps=1e-3, product_rule=1.0, residual_scale="raw"),
            curriculum=dict(stages=6, q=2.0, interval="dagger", length=48.0, length_unit="epochs"),
            optimizer=dict(learning_rate=1e-4, warmup_steps=1000, b1=0.9, b2=0.95, clip_norm=1.0),
            # decays .999, .9996, .9999 per step of 1,024 images
            ema=dict(
                halflife_images=(709e3, 1.774e6, 7.097e6), rampup_ratio=0.05, evaluate=1.774e6
            ),
            guard=dict(every_steps=2000, action="jvp"),
            run=dict(
                log_every_steps=100,
                checkpoint_every_steps=1000,
                score_samples=0,
                score_steps=(1, 2, 4, 50),
            ),
        )
    )
