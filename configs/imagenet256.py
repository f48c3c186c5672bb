r"""ImageNet 256x256 in the latents of the SD autoencoder: SiT-XL/2 becomes a one-step generator.

    python main.py --mode=convert --kind=sit --source=SiT-XL-2-256x256.pt --out=sit_xl2
    python main.py --mode=encode --source=tfds:imagenet2012 --vae=sd_vae --out=latents
    python main.py --config=configs/imagenet256.py --workdir=runs/imagenet256 \
        --config.init=sit_xl2 --config.data.data_dir=latents
    python main.py --config=configs/imagenet256.py:B ...            another size: S, B, M, L or XL
    python main.py --config=configs/imagenet256.py:B,meanflow ...   another method
    python main.py --config=configs/imagenet256.py:XL,in_context,improved ...

The last one takes improved MeanFlow's transformer, in its size: B, M, L or XL.

All methods: configs/methods.py.

Cost: the paper's best run is 48 epochs = 60,000 steps of batch 1024. It reports 1.71 s per step on
4 H100, which is 114 GPU-hours, and one-step FID 14.53 without guidance. The SiT that it starts
from has 11.52 with 50 steps. We have not run it.

The paper's: SiT-XL/2, dagger, no guidance, batch 1024, equal stages, 48 epochs. With 96 epochs its
fifth stage diverged.
Unknown in the paper, and chosen here: K = 6, which never gets finer than d = 1/16, and q = 2.
Unknown in the paper, and here from the official MeanFlow recipe for ImageNet:

- the law of (r, t), p and eps
- Adam at 1e-4 with decays .9 and .95
- label dropout

Ours: clipping at 1, the EMAs and the guard.

Scores at stage boundaries:

    --config.run.protocol=adm-imagenet256-latents --config.run.features=inception
    --config.run.reference=VIRTUAL_imagenet256_labeled.npz --config.run.vae=sd_vae
    --config.run.score_samples=5000

To try the code path:

    --config.data.mock --config.curriculum.length_unit=steps --config.curriculum.length=12
    --config.batch_size=8 --config.run.sample_rows=2
    --config.guard.action=off --config.guard.every_steps=0
"""

from dataclasses import asdict

from configs import methods
from dmf.config import complete
from dmf.errors import DmfError
from dmf.method.flow import TIME_LAWS
from dmf.networks import DIT_SIZES, IN_CONTEXT_SIZES

SIZES = ("XL", "L", "M", "B", "S")
IN_CONTEXT = "in_context"  # improved MeanFlow's transformer in the place of SiT's
# Official MeanFlow for XL/2, L/2 and B/2; none is known for S/2, which takes the values of B/2.
GUIDANCE = {
    "XL": dict(omega=0.2, kappa=0.92, t_start=0.0, t_end=0.75),
    "L": dict(omega=0.2, kappa=0.92, t_start=0.0, t_end=0.8),
    "B": dict(omega=1.0, kappa=0.5, t_start=0.0, t_end=1.0),
    "S": dict(omega=1.0, kappa=0.5, t_start=0.0, t_end=1.0),
}


def get_config(argument: str = ""):
    """The config with the size and the methods named in the argument, in any order."""
    names = methods.names_in(argument, "imagenet256.py", (*SIZES, IN_CONTEXT))
    sizes = [name for name in names if name in SIZES] or ["XL"]
    if len(sizes) > 1:
        raise DmfError(
            f"configs/imagenet256.py:{argument}: expected one size of {', '.join(SIZES)}"
        )
    size, kind, shapes = sizes[0], "dit", DIT_SIZES
    if IN_CONTEXT in names:
        kind, shapes = "in_context_dit", IN_CONTEXT_SIZES
    if size not in shapes or (size not in GUIDANCE and "guided" in names):
        raise DmfError(f"configs/imagenet256.py:{argument}: expected another size than {size}")
    config = complete(
        dict(
            seed=0,
            batch_size=1024,
            label_dropout=0.1,
            network=dict(
                kind=kind, **shapes[size], patch=2, num_classes=1000, interval_init="zero"
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
    chosen = [name for name in names if name not in (*SIZES, IN_CONTEXT)]
    config = methods.apply(config, chosen, "imagenet256.py")
    if "guided" in chosen:
        config.guidance.update(GUIDANCE[size])
        config.curriculum.length = 40.0  # see configs/imagenet256_guided.py
    return config
