"""One of two writers that know nothing of each other: `python -m tests.campaign.rival FROM TO ours|halved ROUNDS`.

Writes the shards of a store into another folder and commits, again and again, with the product's own writer.
"""

from __future__ import annotations

import sys

from distill_ray.storage import Folder
from distill_ray.store import manifest as manifests
from distill_ray.store import open_store, shards
from tests.campaign.damage import halved


def main(source: str, target: str, content: str, rounds: int) -> None:
    store, folder = open_store(source), Folder.at(target)
    make = halved if content == "halved" else lambda store, record: shards.read(store.folder, record, verify=True)
    batches = [(record, make(store, record)) for record in store.manifest.shards]
    for _ in range(rounds):
        records = [
            shards.write(folder, record.split, record.index, batch, store=store.manifest.digest)
            for record, batch in batches
        ]
        splits = manifests.split_records(records)
        manifests.write(folder, store.label_manifest.model_copy(update={"splits": splits}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
