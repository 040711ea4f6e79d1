"""What mkdocs asks while it builds the site: the navigation, the pages and pictures that are computed, the formulas."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import hf_arch
from docs.render import row_page, tables
from docs.render.formula import draw_formulas
from docs.render.picture import picture
from docs.render.reference import configuration, reference
from hf_arch.bench import report, results
from hf_arch.description import beside_released

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
ROWS = {f"architectures/{row.name}.md": row for row in hf_arch.ARCHITECTURES}
HERE = "<!-- computed -->"  # where a page says that something is put
COMPUTED = {"architectures/index.md": tables.of_all_rows, "side_by_side.md": beside_released}  # in pages
PAGES = {  # and as pages of their own
    "api.md": reference,
    "configuration.md": configuration,
    "measured/index.md": lambda: report.page(results.load(RESULTS)),
    "experiments.md": (ROOT / "benchmarks/EXPERIMENTS.md").read_text,
    "conformance.md": (ROOT / "conformance/RESULTS.md").read_text,
    "promises.md": tables.promises,
}
FAMILIES = {
    "dense": "Dense",
    "long_context": "Long context",
    "state_space": "State spaces and recurrences",
    "moe": "Mixtures of experts",
    "hierarchical": "Hierarchies",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation: the architectures by family, then whatever else is in the folder."""
    families: dict[str, list] = {title: [] for title in FAMILIES.values()}
    for path, row in ROWS.items():
        families[FAMILIES[row.family]].append({row.title: path})
    architectures = ["architectures/index.md", *({title: rows} for title, rows in families.items())]
    pages = {path.name for path in Path(config.docs_dir).glob("*.md")} | set(PAGES)
    config.nav = ["index.md", {"Architectures": architectures}, *sorted(pages - {"index.md"})]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    for path in RESULTS.glob("*.png"):
        files.append(File.generated(config, f"measured/{path.name}", abs_src_path=str(path)))
    for path, row in ROWS.items():
        if (source := files.get_file_from_path(path)) is not None:
            panels = row_page.parts(source.content_string)[0]["picture"]
            files.append(File.generated(config, path.replace(".md", ".png"), content=picture(row, panels)))
    return files


def on_page_markdown(markdown: str, page: Page, **told) -> str:
    path = page.file.src_uri
    if path in ROWS:
        return row_page.page(ROWS[path], page.file.content_string)
    return markdown.replace(HERE, COMPUTED[path]()) if path in COMPUTED else markdown


def on_page_content(html: str, **told) -> str:
    return draw_formulas(html)
