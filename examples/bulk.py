"""Draw a file of prompts into shards, damage one, and have it made again.

python examples/bulk.py
"""

from __future__ import annotations

from pathlib import Path

from coalescer_fast.bulk import Settings, check, generate

PROMPTS = ["octopus", "red car", "owl, noto style", "rocket", "little kitten", "pizza"]
SETTINGS = Settings(seed=1, pictures=2, keep_best=1, per_shard=3)


def main() -> None:
    prompts = Path("prompts.txt")
    prompts.write_text("\n".join(PROMPTS), "utf-8")
    report = generate(prompts, "pictures", SETTINGS, workers=1)
    print(f"{report.made} shards of {report.pictures} pictures, mean quality {report.quality:.2f}")

    # A bit that the disk has lost: found by a check, which reads every byte.
    tar = Path("pictures/00001.tar")
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    print("damaged:", check(prompts, "pictures", SETTINGS).damaged)

    # The same call makes what is missing, and leaves the rest alone.
    print("made again:", generate(prompts, "pictures", SETTINGS, workers=1).made)
    print("damaged:", check(prompts, "pictures", SETTINGS).damaged)


if __name__ == "__main__":  # workers are processes, which import this file
    main()
