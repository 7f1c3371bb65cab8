"""A WordNet of a few meanings, as files."""

from __future__ import annotations

DATA = {
    "noun": (
        '00000001 05 n 02 dog 0 domestic_dog 0 001 @ 00000003 n 0000 | a tame canine; "he has a dog"',
        "00000002 05 n 01 puppy 0 001 @ 00000001 n 0000 | a young dog",
        "00000003 05 n 01 animal 0 000 | a living being; one that moves",
    ),
    "verb": ('00000001 30 v 01 dog 0 000 01 + 08 00 | go after; "dog a thief"',),
    "adj": ("00000009 00 a 01 sad(a) 0 000 | unhappy",),
    "adv": (),
}
INDEX = {
    "noun": ("dog n 1 1 @ 1 1 00000001", "domestic_dog n 1 1 @ 1 0 00000001", "puppy n 1 1 @ 1 0 00000002"),
    "verb": ("dog v 1 0 1 0 00000001",),
    "adj": ("sad a 1 0 1 1 00000009",),
    "adv": (),
}


def write_wordnet(folder, data=DATA, index=INDEX):
    for kind, parts in (("data", data), ("index", index)):
        for name, lines in parts.items():
            licence = "  1 This software and database is being provided to you\n"
            (folder / f"{kind}.{name}").write_text(licence + "".join(f"{line}  \n" for line in lines), "utf-8")
