"""The table of kinds of weight files, which conversion and export read."""

from __future__ import annotations

from dmf.convert import (
    adm,
    decoupled_dit,
    dinov2,
    dit_dh,
    edm,
    imeanflow,
    inception,
    meanflow_dit,
    meanflow_sit,
    meanflow_unet,
    native,
    rae_decoder,
    score_sde,
    sit,
    vae,
)
from dmf.convert.kind import Kind
from dmf.errors import DmfError

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        sit.SIT,
        meanflow_dit.MEANFLOW_DIT,
        meanflow_sit.MEANFLOW_SIT,
        imeanflow.IMEANFLOW,
        decoupled_dit.DECOUPLED_DIT,
        dit_dh.DIT_DH,
        meanflow_unet.MEANFLOW_UNET,
        edm.EDM,
        score_sde.RECTIFIED_FLOW,
        adm.TORCHCFM,
        vae.SD_VAE,
        rae_decoder.RAE_DECODER,
        inception.FID_INCEPTION,
        dinov2.DINOV2,
        native.NATIVE,
    )
}


def kind_of(name: str) -> Kind:
    """The kind of that name. Raises DmfError that lists the names there are."""
    if name not in KINDS:
        raise DmfError(f"kind = {name!r}: expected one of {', '.join(KINDS)}")
    return KINDS[name]
