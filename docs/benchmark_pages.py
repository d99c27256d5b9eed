"""The benchmarks' own pages, tables and figures are part of the site, as they lie in the repository."""

from pathlib import Path

from mkdocs.structure.files import File


def on_files(files, config):
    root = Path(config.config_file_path).parent
    results = root / "benchmarks" / "results"
    pages = [path for path in sorted(results.iterdir()) if path.suffix in (".md", ".png", ".svg")]
    for path in [root / "benchmarks" / "README.md", *pages]:
        files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files
