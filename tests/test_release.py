"""One version and one date, wherever they are stated: package, changelog and citation."""

from __future__ import annotations

import re

import yaml

import diffusers_eqvae

HEADING = re.compile(r"^## \[(.+?)\](?: - (.+))?$", re.M)


def stated(root) -> tuple[list[tuple[str, str]], dict]:
    headings = HEADING.findall((root / "CHANGELOG.md").read_text("utf-8"))
    return headings, yaml.safe_load((root / "CITATION.cff").read_text("utf-8"))


def test_package_changelog_and_citation_state_one_version(pytestconfig):
    headings, citation = stated(pytestconfig.rootpath)
    released = [version for version, _ in headings if version != "Unreleased"]
    assert str(citation["version"]) == released[0] == diffusers_eqvae.__version__
    assert headings[0][0] in ("Unreleased", released[0]), "Changes that are not released stand above all others"
    numbers = [tuple(map(int, version.split("."))) for version in released]
    assert numbers == sorted(set(numbers), reverse=True), "The newest version stands first, and each once"


def test_a_version_has_the_date_of_its_release_in_both_or_in_neither(pytestconfig):
    headings, citation = stated(pytestconfig.rootpath)
    date = dict(headings)[diffusers_eqvae.__version__]
    assert date == str(citation.get("date-released", "unreleased")), "A release dates both alike"
    assert date == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", date)
