"""The site builds without a warning, every row has its page, and what pages say by code and pictures is so."""

import re
from unittest.mock import patch

import pytest
import torch
from mkdocs.commands.build import build
from mkdocs.config import load_config

from docs.render import formula, picture, row_page
from docs.render.hooks import HERE, ROOT
from hf_arch import ARCHITECTURES, find
from hf_arch.catalogue import FULL_ATTENTION
from hf_arch.description import RELEASED

FETCHED = re.compile(r"""<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="(?:https?:)?//""")
ROWS = pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)


def written(row) -> str:
    return (ROOT / f"docs/architectures/{row.name}.md").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built strictly: a link that leads nowhere, or a page that is not in the navigation, raises. One released model
    will do: test_description.py has all."""
    folder = tmp_path_factory.mktemp("site")
    few = {name: RELEASED[name] for name in ("Llama 3.1 8B",)}
    with patch.dict(RELEASED, few, clear=True):
        build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


@ROWS
def test_a_row_has_its_page(row, site):
    page = (site / f"architectures/{row.name}.html").read_text()
    assert f"https://arxiv.org/abs/{row.paper.removeprefix('arXiv:')}" in page
    of_formula = page.split('id="formula"')[1].split('id="what-hears-of-what"')[0]
    words = re.sub("<(code|pre|title)>.*?</", "", page.split("<article")[1], flags=re.DOTALL)
    assert of_formula.count("<path d=") and "arithmatex" not in page and "$" not in words
    assert all(reason[:40] in page for reason in row.exceptions.values())
    assert (site / f"architectures/{row.name}.png").stat().st_size > 5000
    assert f"../measured/{row.name}.png" in page and (site / f"measured/{row.name}.png").exists()


@ROWS
def test_an_example_runs(row):
    code = row_page.example(written(row))
    assert len(code.splitlines()) <= 12
    torch.manual_seed(0)
    exec(compile(code, f"{row.name}.md", "exec"), {})


def test_the_site_needs_no_network(site):
    for page in site.rglob("*.html"):
        assert not FETCHED.findall(page.read_text())


def test_what_is_computed_is_there(site):
    table = (site / "architectures/index.html").read_text()
    assert all(f'href="{row.name}.html"' in table for row in ARCHITECTURES) and HERE not in table
    assert "8.03 B" in (site / "side_by_side.html").read_text()
    assert "hf_arch.lora_config(" in re.sub("<[^>]+>", "", (site / "api.html").read_text())
    for name in ("experiments", "conformance", "promises", "configuration", "measured/index"):
        assert len((site / f"{name}.html").read_text()) > 10000


def seen(name: str, **fields) -> torch.Tensor:
    """[answers, tokens] which answers changed."""
    found = picture.influences(picture.build(find(name), fields))[""]
    return found > picture.NOTHING * found.max()


def test_a_picture_shows_what_is_seen():
    away = torch.arange(picture.LENGTH)[:, None] - torch.arange(picture.LENGTH)
    assert torch.equal(seen("transformer"), away >= 0)
    assert torch.equal(seen("transformer", direction="bidirectional"), torch.ones_like(away, dtype=torch.bool))
    window = {"layer_types": ["sliding_attention"], "sliding_window": 5}
    assert torch.equal(seen("transformer", **window), (away >= 0) & (away < 5))
    assert torch.equal(seen("hyena"), away >= 0)
    assert set(picture.influences(picture.build(find("switch"), {"num_hidden_layers": 2}))) > {"encoder", "decoder"}


def test_a_page_without_a_part_is_refused():
    page = written(find("retnet"))
    with pytest.raises(ValueError, match="needs Example"):
        row_page.parts(page.replace("## Example", "## Code"))
    with pytest.raises(ValueError, match="needs picture"):
        row_page.parts(page.replace("picture:", "pictures:"))


def test_a_formula_that_can_not_be_drawn_is_refused():
    assert formula.draw_formulas('<span class="arithmatex">\\(a &lt; b\\)</span>').count("<title>a &lt; b</title>") == 1
    with pytest.raises(ValueError, match="nosuch"):
        formula.svg(r"\nosuch{x}")


def test_promises_that_cannot_be_kept_are_told():
    told = row_page.promises(find("mixtral"))
    assert all(f"**{promise}**: {reason}" in told for promise, reason in FULL_ATTENTION.items())
    assert "Keeps all" in row_page.promises(find("retnet"))
