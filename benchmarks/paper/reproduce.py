"""
The tables and figures of the paper (Mo & Yun, ICML 2025) at small scale, from data to scores.

    python benchmarks/paper/reproduce.py --table 9            # one table on the digits world, three seeds
    python benchmarks/paper/reproduce.py                      # all of them: hours on two cores
    python benchmarks/paper/reproduce.py --figure 2 3 --seeds 0
    python benchmarks/paper/reproduce.py --table 1 --split validation --seeds 0    # choose settings here
    python benchmarks/paper/reproduce.py --world coco --table 1                    # the commands for COCO

Each row is a run of a command, which is printed when it starts. The rows of a table train for the same number of steps
on the same number of images with the same captions, and are scored on the same real images through the real branch:

    no fine-tuning            the model before the run, if there is one
    generated taken for real  f_r(generated), the common practice
    mean shift, CORAL         the same, moved onto f_r(real) by a map that needs no training; pooled embeddings only
    GMAIL                     f_g(generated)
    real                      f_r(real), the upper bound

Gap closed = (row - generated taken for real) / (real - generated taken for real), one reading of the paper's Table 9.
Finished runs in --work_dir are reused. The output is NAME.json, NAME.md and the figures.
"""

import argparse
import json
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recipes import FIGURES, GENERATED, REAL
from runs import FEWER_STEPS, Runs
from tables import TABLES, coco_commands


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=("digits", "coco"), default="digits")
    parser.add_argument("--table", type=int, nargs="+", choices=range(1, 18), metavar="1..17", help="of the paper")
    parser.add_argument("--title", nargs="+", default=[""], help="only tables whose title contains one of these")
    parser.add_argument("--figure", type=int, nargs="+", choices=list(FIGURES), metavar="2,3", help="of the paper")
    parser.add_argument("--name", default="paper", help="name of the output files")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/paper"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/stage2"), help="folder of the runs")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="split of the scored images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_pairs", type=int, default=2000, help="training pairs")
    parser.add_argument("--num_test", type=int, default=1000, help="scored real images")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, with one thread per run")
    args = parser.parse_args(argv)
    if args.table is None and args.figure is None:
        args.table, args.figure = list(range(1, 18)), list(FIGURES) if args.title == [""] else []
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    tables = [table for table in TABLES if set(table.numbers) & set(args.table or [])]
    tables = [table for table in tables if any(title in table.title for title in args.title)]
    if args.world == "coco":
        printed: set[str] = set()
        for table in tables:
            # Print each command once, because a second training run into the same folder is refused.
            above = ["# This table also needs commands from above."] if printed else []
            lines = [line for line in coco_commands(table) if line not in printed]
            printed.update(lines)
            print("\n".join([f"# {table.heading}", *above, *lines, ""]))
        return {}
    from gmail_hf.evaluation import environment, provenance
    from gmail_hf.metrics import aggregate

    start = time.perf_counter()
    slots = threading.Semaphore(args.jobs)
    steps = "-".join(count for _, count in FEWER_STEPS.values())
    folder = args.work_dir / f"{args.split}-{args.num_pairs}-{args.num_test}-{steps}"
    sizes = (args.split, args.num_pairs, args.num_test)
    runs = [Runs(folder / f"seed{seed}", seed, *sizes, slots) for seed in args.seeds]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    # One thread per table waits for its runs; `slots` limits the number of concurrent runs.
    with ThreadPoolExecutor(max_workers=len(runs) * (len(tables) + len(FIGURES))) as pool:
        rows = {(table.title, one.seed): pool.submit(table.rows, one) for one in runs for table in tables}
        figures = {
            number: pool.submit(FIGURES[number], runs[0], args.output_dir / f"{args.name}_figure{number}.png")
            for number in args.figure or []
        }
        rows = {key: future.result() for key, future in rows.items()}
        figures = {number: future.result() for number, future in figures.items()}
    result = {
        "environment": environment(Path(__file__).parent),
        "settings": {key: value for key, value in vars(args).items() if key not in ("output_dir", "work_dir")}
        | {"max_steps": {stage: int(count) for stage, (_, count) in FEWER_STEPS.items()}},
        "tables": {},
    }
    sections = []
    for table in tables:
        by_seed = {seed: with_gaps(rows[table.title, seed], table.headline) for seed in args.seeds}
        mean, spread = aggregate(list(by_seed.values()))
        result["tables"][table.title] = {"mean": mean, "standard_deviation": spread, "seeds": by_seed}
        sections += [f"## {table.heading}", "", *table.note, to_markdown(mean, spread, table.headline), ""]
        sections += ["The paper, on photographs:", "", table.paper, ""] if table.paper else []
    result["seconds"] = round(time.perf_counter() - start)
    made, found = sum(len(one.made) for one in runs), sum(len(one.found) for one in runs)
    result["runs"] = {"made": made, "found": found}
    (args.output_dir / f"{args.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    seeds = ", ".join(map(str, args.seeds))
    heading = [
        "# The paper's tables on the digits world",
        "",
        f"Mean ± standard deviation over the seeds {seeds}; {args.num_pairs} training pairs, scored on up to "
        f"{args.num_test} real {args.split} images. Gap closed = (row − generated taken for real) / (real − generated "
        "taken for real), seed by seed.",
        "",
        f"Of {made + found} training runs, {found} were reused from earlier calls; the time below is that of the "
        "others.",
        "",
    ]
    (args.output_dir / f"{args.name}.md").write_text("\n".join([*heading, *sections, *provenance(result), ""]))
    print("\n".join(sections))
    for number, path in figures.items():
        print(f"Figure {number}: {path}")
    return result


def with_gaps(rows: list[dict], headline: tuple[str, ...]) -> list[dict]:
    """Add `NAME_gap_closed` for each headline score, None if there is no gap or no score."""
    from gmail_hf.metrics import gap_closed

    by_name = {row["row"]: row for row in rows}
    for row in rows:
        for score in headline:
            values = [row[score], by_name[GENERATED][score], by_name[REAL][score]]
            gap = math.nan if None in values else gap_closed(*values).value
            row[f"{score}_gap_closed"] = None if math.isnan(gap) else gap
    return rows


def to_markdown(mean: list[dict], spread: list[dict], headline: tuple[str, ...]) -> str:
    """A Markdown table with `row` first and the gap closed after each headline score."""
    scores = [key for key in mean[0] if key != "row" and not key.endswith("_gap_closed")]
    columns = []
    for score in scores:
        columns += [score, f"{score}_gap_closed"] if score in headline else [score]
    titles = ["gap closed" if key.endswith("_gap_closed") else key.replace("_", " ") for key in columns]
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(columns)]
    for row, deviation in zip(mean, spread, strict=True):
        cells = [_cell(row[key], deviation[key]) for key in columns]
        lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, spread: float | None) -> str:
    if value is None:
        return "–"
    digits = 0 if value >= 1000 else 1 if value >= 10 else 3
    return f"{value:,.{digits}f} ± {spread:,.{digits}f}"


if __name__ == "__main__":
    main()
