"""Put trained parts together into a pipeline folder with half-precision weights, as the package embeds it.

python -m coalescer_fast.training.embed RUN_OF_COALESCER RUN_OF_DECODER OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from .. import files
from ..models import CoalescerAutoencoder
from ..pipeline import CoalescerPipeline


def embed(coalescer_run: Path, decoder_run: Path, out: Path) -> None:
    """Save a pipeline in float16.

    Args:
        coalescer_run: folder of the training that made the pipeline.
        decoder_run: folder of the training of its autoencoder's decoder, which had the same encoder.
        out: folder that is written.
    """
    pipe = CoalescerPipeline.from_pretrained(coalescer_run / "pipeline")
    vae = CoalescerAutoencoder.from_pretrained(decoder_run / "autoencoder")
    latent_of = vae.state_dict()
    for name, tensor in pipe.vae.state_dict().items():
        if not name.startswith("decoder.") and not tensor.equal(latent_of[name]):
            raise ValueError(f"the encoder of {decoder_run} is not the one that {coalescer_run} was trained on")
    pipe.register_modules(vae=vae)
    pipe.unet.half()
    pipe.vae.half()
    with files.writing_folder(out) as folder:
        pipe.save_pretrained(folder)


if __name__ == "__main__":
    embed(*map(Path, sys.argv[1:4]))
