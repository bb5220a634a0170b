"""What an adapter says of itself: in its metadata, in files beside it, on its card.

It is shown as it was found, and nothing follows from it. Pictures are left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loratool.adapter.model import Adapter
from loratool.errors import FileFormatError
from loratool.files.json import read_json_object

__all__ = ["About", "about", "without_pictures"]

CARD: Final = "README.md"
SIDECARS: Final = (".civitai.info", ".metadata.json", ".cm-info.json", ".json")
"""What the files of Civitai Helper, LoRA Manager, Stability Matrix and A1111 end in."""
PICTURE: Final = re.compile(r"\s*\[?\s*\"?(data:image/|/9j/|iVBORw0KGgo|UklGR|R0lGOD)")
"""How pictures begin that are texts: data URLs, and base64 of JPEG, PNG, WebP and GIF."""
MOST_TAGS: Final = 100
"""How many of the commonest tags are kept."""
LONGEST: Final = 1000
"""How much of a text is kept."""
TRIGGERS: Final = (
    "modelspec.trigger_phrase",
    "ss_trigger_words",
    "trigger_phrase",
    "trigger_words",
    "trigger_word",
    "instance_prompt",
)
UNKNOWN: Final = ("", "none", "unknown", "other", "null")
"""What tools write where they do not know."""
RECORDED: Final = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Hashes that trainers write into the metadata."""
OF_SITE: Final = ("AutoV1", "AutoV2", "AutoV3", "SHA256")
"""Hashes of a file that a model site gives."""


@dataclass(frozen=True, slots=True)
class About:
    """What an adapter says of itself; ``None`` or nothing where it does not say.

    Attributes:
        base: What it was trained on.
        architecture: What kind of model that is, in the words of whoever wrote it.
        title: Its title.
        author: Who made it.
        license: Under which licence.
        triggers: Words that a prompt should have.
        tags: The commonest tags of the pictures that it was trained on, and how often they occur.
        resolution: Of these pictures, such as ``1024x1024``.
        buckets: Their shapes, and how many pictures of each there were.
        images: How many pictures there were.
        steps: For how many steps it was trained.
        epochs: For how many epochs.
        optimizer: With which optimiser.
        learning_rate: At which rate.
        hashes: Hashes that are recorded, by the names under which they are.
        sources: The files beside it that were read.
        notes: What could not be read, one sentence each.
    """

    base: str | None = None
    architecture: str | None = None
    title: str | None = None
    author: str | None = None
    license: str | None = None
    triggers: tuple[str, ...] = ()
    tags: tuple[tuple[str, int], ...] = ()
    resolution: str | None = None
    buckets: tuple[tuple[str, int], ...] = ()
    images: int | None = None
    steps: int | None = None
    epochs: int | None = None
    optimizer: str | None = None
    learning_rate: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the keys that the command line's JSON promises."""
        return {
            "base": self.base,
            "architecture": self.architecture,
            "title": self.title,
            "author": self.author,
            "license": self.license,
            "triggers": list(self.triggers),
            "tags": [{"tag": tag, "count": count} for tag, count in self.tags],
            "resolution": self.resolution,
            "buckets": [{"resolution": shape, "count": count} for shape, count in self.buckets],
            "images": self.images,
            "steps": self.steps,
            "epochs": self.epochs,
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "hashes": dict(self.hashes),
            "sources": list(self.sources),
        }


def about(adapter: Adapter) -> About:
    """Return what ``adapter`` says of itself; no tensor is read."""
    said = adapter.metadata
    beside = _Beside(adapter)
    trainer = _object(said.get("training_info"))
    data = _Pictures.of(said)
    version = beside.model_version
    return About(
        base=_first(
            adapter.base_model,
            said.get("ss_sd_model_name"),
            *_texts(beside.card.get("base_model")),
            version.get("baseModel"),
            beside.manager.get("BaseModel"),
            beside.webui.get("sd version"),
        ),
        architecture=_first(said.get("modelspec.architecture"), said.get("ss_base_model_version")),
        title=_first(
            said.get("modelspec.title"),
            _titled(version),
            beside.manager.get("ModelName"),
            said.get("ss_output_name"),
            said.get("name"),
        ),
        author=_first(
            said.get("modelspec.author"), _object(version.get("creator")).get("username")
        ),
        license=_first(said.get("modelspec.license"), *_texts(beside.card.get("license"))),
        triggers=_words(
            *(said.get(key) for key in TRIGGERS),
            version.get("trainedWords"),
            beside.manager.get("TrainedWords"),
            beside.webui.get("activation text"),
            beside.card.get("instance_prompt"),
        ),
        tags=tuple(data.tags.most_common(MOST_TAGS)),
        resolution=_first(data.resolution, said.get("modelspec.resolution")),
        buckets=tuple(data.buckets.most_common()),
        images=_number(said.get("ss_num_train_images")),
        steps=_number(said.get("ss_steps"), trainer.get("step")),
        epochs=_number(said.get("ss_epoch"), said.get("ss_num_epochs"), trainer.get("epoch")),
        optimizer=_first(said.get("ss_optimizer")),
        learning_rate=_first(said.get("ss_learning_rate")),
        hashes=dict(_hashes(said, version)),
        sources=tuple(beside.sources),
        notes=tuple(beside.notes),
    )


def without_pictures(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata with how long a picture is in its place."""
    return {
        key: f"(a picture, {len(text)} characters)" if PICTURE.match(text) else text
        for key, text in metadata.items()
    }


class _Beside:
    """The files beside an adapter that tell of it, as far as they can be read."""

    def __init__(self, adapter: Adapter) -> None:
        self.sources: list[str] = []
        self.notes: list[str] = []
        file = adapter.weights
        info, managed, matrix, self.webui = (
            self._read(file.with_suffix(suffix), read_json_object) for suffix in SIDECARS
        )
        self.model_version = info or _object(managed.get("civitai"))
        self.manager = {
            "ModelName": managed.get("model_name"),
            "BaseModel": managed.get("base_model"),
            **matrix,
        }
        is_own = adapter.path != file or adapter.config is not None
        self.card = self._read(file.parent / CARD, _front_matter) if is_own else {}

    def _read(self, path: Path, read: Any) -> dict[str, Any]:
        if not path.is_file():
            return {}
        try:
            found: dict[str, Any] = read(path)
        except FileFormatError as error:
            self.notes.append(f"{path.name} beside it is not read: {error.what}")
            return {}
        self.sources.append(path.name)
        return found


def _front_matter(path: Path) -> dict[str, Any]:
    from loratool.files.yaml import read_front_matter  # few have a card

    return read_front_matter(path)


@dataclass(frozen=True, slots=True)
class _Pictures:
    """The pictures of a training: all data sets together."""

    tags: Counter[str]
    buckets: Counter[str]
    resolution: str | None

    @staticmethod
    def of(said: Mapping[str, str]) -> _Pictures:
        tags: Counter[str] = Counter()
        buckets: Counter[str] = Counter()
        sets = _list(said.get("ss_datasets"))
        shapes = [_shape(said.get("ss_resolution")), *(_shape(s.get("resolution")) for s in sets)]
        for table in (said.get("ss_tag_frequency"), *(s.get("tag_frequency") for s in sets)):
            for folder in _object(table).values():
                for tag, count in _object(folder).items():
                    if (number := _number(count)) is not None:
                        tags[_cut(tag.strip())] += number
        for info in (said.get("ss_bucket_info"), *(s.get("bucket_info") for s in sets)):
            for bucket in _object(_object(info).get("buckets")).values():
                shape = _shape(_object(bucket).get("resolution"))
                if shape and (number := _number(_object(bucket).get("count"))) is not None:
                    buckets[shape] += number
        known = dict.fromkeys(shape for shape in shapes if shape)
        return _Pictures(tags, buckets, ", ".join(known) or None)


def _hashes(said: Mapping[str, str], version: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield hashes as they are recorded; a model site's only where it has one file."""
    for key in RECORDED:
        if (text := _first(said.get(key))) is not None:
            yield key, text
    files = [_object(each) for each in version.get("files") or () if isinstance(each, dict)]
    of_one = [_object(each.get("hashes")) for each in files if each.get("type") in (None, "Model")]
    if len(of_one) == 1:
        for name in OF_SITE:
            if (text := _first(of_one[0].get(name))) is not None:
                yield name, text.lower()


def _titled(version: Mapping[str, Any]) -> str | None:
    """Return the title of a version of a model, as a model site has it."""
    model = _first(_object(version.get("model")).get("name"))
    name = _first(version.get("name"))
    return f"{model} {name}" if model and name else model or name


def _first(*values: Any) -> str | None:
    """Return the first that is a text and says something."""
    for value in values:
        is_said = isinstance(value, str) and value.strip().lower() not in UNKNOWN
        if is_said and not PICTURE.match(value):
            return _cut(value.strip())
    return None


def _texts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _words(*values: Any) -> tuple[str, ...]:
    """Return the words in texts with commas, and in lists of such, each once."""
    words: dict[str, None] = {}
    for value in values:
        parsed = _list_or_text(value)
        for text in parsed:
            if isinstance(text, str) and not PICTURE.match(text):
                found = (_cut(word.strip()) for word in text.split(","))
                words |= dict.fromkeys(word for word in found if word.lower() not in UNKNOWN)
    return tuple(words)


def _list_or_text(value: Any) -> Iterable[Any]:
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return (value,)
    return value if isinstance(value, list) else (value,)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _number(*values: Any) -> int | None:
    """Return the first whole number from 0 on, written as one or as a text."""
    for value in values:
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(text, str) and re.fullmatch(r"\d{1,15}", text):
            return int(text)
    return None


def _shape(value: Any) -> str | None:
    """Return ``1024x1024`` of a pair of numbers, of one, or of a text with such."""
    numbers = re.findall(r"\d{1,6}", value) if isinstance(value, str) else value
    if isinstance(value, int) and not isinstance(value, bool):
        numbers = [value]
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= 3:
        return None
    sizes = [_number(number) for number in numbers]
    if None in sizes:
        return None
    return "x".join(map(str, sizes * 2 if len(sizes) == 1 else sizes))


def _object(value: Any) -> dict[str, Any]:
    """Return an object, written as one or as JSON; an empty one where it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _list(value: str | None) -> list[dict[str, Any]]:
    """Return the objects of a list that is written as JSON."""
    try:
        found = json.loads(value or "[]")
    except (ValueError, RecursionError):
        return []
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
