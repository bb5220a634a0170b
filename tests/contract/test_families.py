"""What every family of models promises, whoever wrote it; a fake one is among them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from fakes.finding import find_fakes
from samples import FIXTURES

from loratool.names.families import FILES, claiming, claiming_flat, families, family_named
from loratool.names.family import Family, Fusion, stretches
from loratool.names.pipelines import COMFY_ENCODERS, KOHYA_ENCODERS
from loratool.names.vocabulary import NUMBER, filled, flatten

with pytest.MonkeyPatch.context() as patch:
    find_fakes(patch)
    FAMILIES = families()

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(autouse=True)
def _with_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    find_fakes(monkeypatch)


def table(family: Family) -> Iterator[tuple[str, Fusion]]:
    for row in family.rows:
        for number in range(row.count):
            native = row.native.replace(NUMBER, str(number))
            fusion = family.from_native(native)
            assert fusion is not None
            yield native, fusion


def names_of(family: Family) -> set[str]:
    hubs = {name for row in family.rows for name in row.hub.modules}
    natives = {row.native for row in (*family.rows, *family.others)}
    vocabularies = (family.hub_names, family.native_names)
    return hubs.union(natives, *(each.templates for each in vocabularies))


@each_family
def test_its_rows_are_read_in_both_directions(family: Family) -> None:
    hubs = set()
    for native, fusion in table(family):
        for module in fusion.modules:
            assert module not in hubs
            hubs.add(module)
            assert family.to_native(module) == (native, fusion)
            assert family.has(module) and family.has(native)


@each_family
def test_its_vocabularies_have_its_rows(family: Family) -> None:
    for native, fusion in table(family):
        assert family.native_names.parse(flatten(native)) == (native,)
        for module in fusion.modules:
            assert family.hub_names.parse(flatten(module)) == (module,)


def test_files_claim_what_they_hold_and_nothing_else() -> None:
    for file, claim in FILES.claims().items():
        held = FILES.load(file)
        assert set(claim["families"]) == {family.name for family in held if family.rows}
        names = {name for family in held for name in names_of(family)}
        assert set(claim["segments"]) == {name.partition(".")[0] for name in names}


@each_family
def test_it_is_asked_about_its_own_paths(family: Family) -> None:
    for template in names_of(family):
        name = filled(template, ("0",) * template.count(NUMBER))
        assert family in claiming([name])
        assert family in claiming_flat(flatten(name))


@each_family
def test_its_fusions_share_every_output_once(family: Family) -> None:
    made = [row.hub for row in (*family.rows, *family.others)]
    kinds = {(len(f.modules), f.sizes, f.swapped, f.shares): f for f in made}
    for fusion in kinds.values():
        heights = fusion.heights(12, None, dict.fromkeys(fusion.modules[:1], 12))
        assert heights is not None, "neither its shares nor one of its parts tell the others"
        total = sum(heights)
        assert fusion.heights(12, total) == heights
        found = stretches(heights, swapped=fusion.swapped)
        assert found is not None
        natives = [each.native + i for each in found for i in range(each.count)]
        assert sorted(natives) == list(range(total))
        for part, height in enumerate(heights):
            mine = [each for each in found if each.part == part]
            hubs = [each.first + i for each in mine for i in range(each.count)]
            assert hubs == list(range(height))


@each_family
def test_its_encoders_have_names_in_every_scheme(family: Family) -> None:
    if family.rows:
        for names in (KOHYA_ENCODERS, COMFY_ENCODERS):
            found = names.of(family.name)
            assert set(family.encoders) <= set(found)
            assert len(set(found.values())) == len(found)


@each_family
def test_what_it_refines_is_a_family_with_modules_of_the_same_names(family: Family) -> None:
    if family.refines is not None:
        plain = family_named(family.refines)
        assert plain.refines is None and plain.backbone == family.backbone
        assert any(map(plain.has, (m for _, fusion in table(family) for m in fusion.modules)))


@each_family
def test_its_further_namings_are_read(family: Family) -> None:
    for row in family.others:
        native = row.native.replace(NUMBER, "0")
        fusion = family.from_native(native)
        assert fusion is not None and not family.is_written(native)
        for module in fusion.modules:
            assert (native, fusion) in family.wholes(module)
            name, whole = family.wholes(module)[0]
            assert family.is_written(name) and family.to_native(module) == (name, whole)


@each_family
def test_one_of_its_releases_is_the_usual_one(family: Family) -> None:
    widths = [release.width for release in family.releases]
    assert len(set(widths)) == len(widths)
    assert not widths or None in widths
    assert len(widths) <= 1 or family.told_by


@pytest.mark.parametrize(
    "names",
    [
        ("model.layers.0.self_attn.q_proj", "lm_head"),
        ("transformer.h.0.attn.c_attn", "transformer.wte"),
        ("bert.encoder.layer.0.attention.self.query",),
        ("gpt_neox.layers.0.attention.query_key_value", "embed_out"),
        ("model.decoder.layers.0.fc1",),
        ("encoder.block.0.layer.0.SelfAttention.q", "shared"),
        ("text_model.encoder.layers.0.self_attn.q_proj",),
    ],
)
def test_modules_of_language_models_are_claimed_by_none(names: tuple[str, ...]) -> None:
    assert claiming(names) == ()
    assert [claiming_flat(flatten(name)) for name in names] == [()] * len(names)


@pytest.mark.parametrize("adapter", ["lora-linear", "gpt2-conv1d", "llava"])
def test_no_family_is_imported_for_a_language_model(adapter: str) -> None:
    """Nor any vocabulary, nor the reader of a container that is not there."""
    base = {"gpt2-conv1d": "gpt2", "llava": "llava"}.get(adapter, "llama-untied")
    code = (
        "import sys, loratool; from loratool.verbs.merging.planning import plan_merge; "
        f"loratool.inspect({str(FIXTURES / 'adapters' / adapter)!r}); "
        f"plan_merge({str(FIXTURES / 'bases' / base)!r}, "
        f"[{str(FIXTURES / 'adapters' / adapter)!r}]); "
        "print([name for name in sys.modules if name.startswith(("
        "'loratool.names.families.', 'loratool.names.language', 'loratool.files.pickle', "
        "'loratool.files.torch'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
