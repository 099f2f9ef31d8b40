"""Opening the stores of a run: by way of the node's cache, and only if they are what the config asks for."""

from __future__ import annotations

from distill_ray.artifacts import Stage
from distill_ray.config import Config, InputConfig, InputWish
from distill_ray.errors import UserError
from distill_ray.store import ShardCache, Store, check_identity, check_twins, open_store
from distill_ray.store import manifest as manifests

_REMEDY = "delete that folder, the same command makes it again"


def cache_of(config: Config) -> ShardCache:
    """Where this node keeps copies of remote shards."""
    return ShardCache.of(config.cluster.cache_dir, config.cluster.cache_gib)


def data_store(config: Config, data: Stage) -> Store:
    """The data store of a finished stage.

    Raises:
        UserError: the folder holds another store, or one with another input contract.
    """
    store = open_store(data.folder, cache_of(config))
    manifest = store.data_manifest
    check_identity(store, data.digest, _REMEDY)
    held, wanted = manifest.input, config.data.input
    differing = _differing_key(held, wanted)
    if differing is not None:
        raise UserError(
            f"{data.folder}: the input contract of data {data.digest} is another: {differing} "
            f"{getattr(held, differing)}, the config has {getattr(wanted, differing)}: {_REMEDY}"
        )
    return store


def _differing_key(held: InputConfig, wanted: InputConfig | InputWish) -> str | None:
    """The first key in which a store's contract is not what the config asks for."""
    free = (None, "auto") if isinstance(wanted, InputWish) else ()  # what the rows decided
    for key in type(wanted).model_fields:
        given = getattr(wanted, key)
        if given not in free and getattr(held, key) != given:
            return key
    return None


def label_store(config: Config, labels: Stage, data: Store) -> Store:
    """The label store of a finished stage, made from ``data``.

    Raises:
        UserError: the folder holds another store, or one that was made from other data.
    """
    store = open_store(labels.folder, cache_of(config))
    check_twins(data, store)
    check_identity(store, labels.digest, _REMEDY)
    return store


def check_teacher(store: Store, teacher: Stage, weights_sha256: str) -> None:
    """Refuse labels that another teacher made.

    Raises:
        UserError: names both teachers.
    """
    made_by = store.label_manifest
    for what, held, wanted in (
        ("teacher", made_by.teacher_digest, teacher.digest),
        ("weights", made_by.teacher_weights_sha256, weights_sha256),
    ):
        if held != wanted:
            raise UserError(f"{store.folder}: was made by {what} {held}, the config's is {wanted}: {_REMEDY}")


def has_labels(data: Store, split: str) -> bool:
    """Whether any row of the split has a label; reads its shards up to the first that has."""
    return any((data.data_shard(record).labels >= 0).any() for record in data.manifest.splits[split].shards)


def store_is_whole(target: Stage) -> bool:
    """Whether the store is committed and every shard is there in its size.

    Raises:
        UserError: it is one of a newer format, which must not be made again over it.
    """
    content = target.finished()
    if content is None or content.get("format") != manifests.FORMAT:
        return False
    manifests.check_version(content, target.folder.location(manifests.FILE))
    try:
        return open_store(target.folder).missing_shard() is None
    except UserError:
        return False
