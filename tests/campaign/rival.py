"""One of two writers that know nothing of each other: `python -m tests.campaign.rival FROM TO ours|halved ROUNDS`.

Writes the shards of a store into another folder and commits, again and again, with the product's own writer and commit.
Prints how often it committed, and what it was told when it could not, as one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

from distill_ray.artifacts import Stage
from distill_ray.errors import DistillRayError
from distill_ray.stages import shard_job
from distill_ray.storage import Folder
from distill_ray.store import manifest as manifests
from distill_ray.store import open_store, shards
from tests.campaign.damage import halved


def main(source: str, target: str, content: str, rounds: int) -> None:
    store = open_store(source)
    stage = Stage("labels", store.manifest.digest, Folder.at(target))
    make = halved if content == "halved" else lambda store, record: shards.read(store.folder, record, verify=True)
    batches = [(record, make(store, record)) for record in store.manifest.shards]
    committed, refused = 0, Counter[str]()
    for _ in range(rounds):
        try:
            records = [
                shards.write(stage.folder, record.split, record.index, batch, store=stage.digest)
                for record, batch in batches
            ]
            splits = manifests.split_records(records)
            shard_job.commit(stage, store.label_manifest.model_copy(update={"splits": splits}))
            committed += 1
        except (DistillRayError, FileNotFoundError) as error:  # the command ends with exit 1 at either
            refused[type(error).__name__] += 1
    print(json.dumps({"committed": committed, "refused": refused}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
