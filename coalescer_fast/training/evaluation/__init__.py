"""How good a model's samples are: retrieval, Fréchet distance, variety, memorisation, and what its two heads say.

Every sampler is measured by `measure` on the same prompts and the same noise, against the same real pictures
(`RealPictures`). The columns:

- ``name_top1``, ``name_top10``: over all training concepts, prompt = name: the real training picture nearest to the
  sample, or one of the ten nearest, shows the concept. Nearest in latents by ||a - b||_2; ``name_top1_pixels``: in
  pictures of 4x4 means instead.
- ``name_style_top1``: the same for "name, style" of random training pictures; ``name_style_all_top1``: of every one.
  ``keyword_top1``, ``keyword_top10``: for three of a concept's keywords. As the concepts were trained on, a hit says
  that the model knows the picture, not that it composes one.
- ``held_out_group``: over concepts kept out of training, the nearest training picture is of the right group; by chance
  ``held_out_group_chance`` = sum_g p_train(g) p_held_out(g).
- ``fd_name``, ``fd_name_style``: `frechet_distance` between samples for the descriptions of random training pictures
  and all training pictures, in a classifier's features; ``fd_floor_real``: random training pictures against the others;
  ``fd_floor_autoencoder``: reconstructions of the same pictures against all, which no sampler that decodes by this
  autoencoder should expect to beat.
- ``density``, ``coverage``: how well the samples of ``fd_name`` cover the training pictures that were described, in the
  same features: `density_and_coverage` of as many samples as pictures. Real pictures have about 1 and .97.
- ``free_wording``: over wordings that are no names, `WORDING_SEEDS` samples each: the nearest training picture, in
  latents, is of a concept that is accepted for the wording. For given wordings alone, see `read_wordings`.
- ``psnr_autoencoder_held_out``, ``psnr_autoencoder_train``: mean dB of reconstructions, without any exclusions.
- ``styles_hit`` of ``styles_real``: distinct styles among a concept's real pictures that are nearest to 8 samples of
  its name.
- ``nearest_train_ratio``: mean distance of name samples to the nearest training picture, over the mean distance of
  training pictures to the nearest other one; ``below_q5``: share of the samples below the 5 % quantile of the latter
  (real pictures: 0.05).
- ``direction_length_spearman``: rank correlation of |direction| at the first step with -|final latent - x|, x the
  latent of the training picture that was described; ``distance_r2`` = 1 - sum (distance - |x - R|)^2 / sum (|x - R| -
  mean |x - R|)^2 at the first step.
- ``seconds_per_picture``: wall clock of a warm batch of four, decoding included, the median of five.

Columns that a data set has nothing for (styles, held-out concepts, ...) are left out.
"""

from .evaluate_pipeline import evaluate, exclusions
from .frechet import frechet_distance
from .measurement import measure
from .prompts import read_wordings
from .real_pictures import RealPictures
from .samplers import FirstStep, Sampler, coalescer_sampler, first_step_of, quiet

__all__ = [
    "FirstStep",
    "RealPictures",
    "Sampler",
    "coalescer_sampler",
    "evaluate",
    "exclusions",
    "first_step_of",
    "frechet_distance",
    "measure",
    "quiet",
    "read_wordings",
]
