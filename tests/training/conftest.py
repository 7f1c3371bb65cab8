from __future__ import annotations

import pytest
import torch

from coalescer_fast import CoalescerAutoencoder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A folder with a small untrained autoencoder, as of a training."""
    folder = tmp_path_factory.mktemp("autoencoder")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CoalescerAutoencoder(2, 4, 16, (1, 1), (1, 1)).save_pretrained(folder / "autoencoder")
    return folder
