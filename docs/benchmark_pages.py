"""The benchmarks' own pages, tables and figures are part of the site, as they lie in the repository."""

from pathlib import Path

from mkdocs.structure.files import File


def on_files(files, config):
    root = Path(config.config_file_path).parent
    results = root / "benchmarks" / "results"
    for path in [root / "benchmarks" / "README.md", *sorted(results.glob("*.md")), *sorted(results.glob("*.png"))]:
        files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files
