"""What not knowing an image's origin costs: readouts on a mix of real and generated images, several seeds.

    python benchmarks/auto_modality.py  # the shipped digits world, test split
    python benchmarks/auto_modality.py --name cifake-auto --pairs cifake/pairs-train.parquet \\
        --real_test cifake/real-validation.parquet --model_name_or_path cifake/base-clip --label_column label \\
        --num_pairs 9000 --num_heldout 1000 --max_steps 100 --batch_size 256 --learning_rate 1e-3

Data, splits and options are those of digits_alignment.py. The detector is fitted on the training pairs. Rows differ
in the branch that images of unknown origin pass: the true one, the one that the detector names (threshold 0.5), `real`
for all, `gen` for all. Two readouts are measured in two situations:

    serve   fitted on f_g(generated images of the training pairs), whose origin is known; tested on equally many
            held-out generated and real test images, of unknown origin
    learn   fitted on images of unknown origin, one of each pair that alignment and detector never saw, half of them
            generated; tested on f_r(real test images)

It writes NAME.json and NAME.md with mean and standard deviation over the seeds.
"""

import sys

import digits_alignment
import numpy as np

VARIANTS = ["GMAIL (Eq. 1)", "GMAIL, recipe robust"]
ROWS = ("true modality", "auto", "all real", "all gen")


def through(way: str, real: np.ndarray, gen: np.ndarray, truth: np.ndarray, detected: np.ndarray) -> np.ndarray:
    """Embeddings `(images, dim)`, each by the branch that a `way` of `ROWS` chooses; `truth`: which are generated."""
    is_gen = {"true modality": truth, "auto": detected, "all gen": np.ones_like(truth)}.get(way, np.zeros_like(truth))
    return np.where(is_gen[:, None], gen, real)


def run_seed(args, model_path: str, seed: int, folder: str) -> list[dict]:
    import torch
    from transformers import AutoImageProcessor

    from gmail_hf import embed_images, fit_detector
    from gmail_hf.metrics import expected_calibration_error
    from gmail_hf.metrics.train_on_generated import READOUTS

    train, heldout, unseen, test = digits_alignment.load_data(args, seed)
    processor = AutoImageProcessor.from_pretrained(model_path)
    rng = np.random.default_rng(seed)
    count = min(len(heldout), len(test))
    some = test.select(rng.permutation(len(test))[:count])
    even, odd = (unseen.select(range(start, len(unseen), 2)) for start in (0, 1))

    def labels(*parts) -> dict[str, np.ndarray]:
        of_parts = [digits_alignment.labels_of(args, part) for part in parts]
        return {task: np.concatenate([part[task] for part in of_parts]) for task in of_parts[0]}

    served_images = [*heldout.select(range(count))["generated_image"], *some["image"]]
    learned_images = [*even["generated_image"], *odd["real_image"]]
    served_labels, learned_labels = labels(heldout.select(range(count)), some), labels(even, odd)
    train_labels, test_labels = labels(train), labels(test)
    served_truth, learned_truth = np.arange(2 * count) < count, np.arange(len(unseen)) < len(even)

    rows, detector = [], None
    for name in args.variants:
        model = digits_alignment.align(args, name, model_path, processor, train, seed, folder)
        if detector is None:  # all that reads the frozen branch
            scores = fit_detector(model, processor, train, seed=seed)
            detector = model.detector
            served_real, learned_real, test_real = (
                embed_images(model, processor, images) for images in (served_images, learned_images, test["image"])
            )
            probabilities = [detector(torch.from_numpy(embeds)).numpy() for embeds in (served_real, learned_real)]
            found = {
                "detector_accuracy": float(np.mean((probabilities[0] >= 0.5) == served_truth)),
                "detector_calibration_error": expected_calibration_error(probabilities[0], served_truth),
                "detector_heldout_accuracy": scores["accuracy"],
            }
        served_gen, learned_gen, train_gen = (
            embed_images(model, processor, images, "gen")
            for images in (served_images, learned_images, train["generated_image"])
        )
        for way in ROWS:
            served = through(way, served_real, served_gen, served_truth, probabilities[0] >= 0.5)
            learned = through(way, learned_real, learned_gen, learned_truth, probabilities[1] >= 0.5)
            row = {"row": f"{name}: {way}"}
            for readout, score in READOUTS.items():

                def accuracy(fitted, fitted_labels, tested, tested_labels, score=score):
                    tasks = [(fitted, fitted_labels[task], tested, tested_labels[task]) for task in tested_labels]
                    return float(np.mean([score(*task) for task in tasks]))

                for part, rows_of_part in (("real", ~served_truth), ("generated", served_truth)):
                    part_labels = {task: values[rows_of_part] for task, values in served_labels.items()}
                    fitted = train_gen, train_labels
                    row[f"{readout}_serve_{part}"] = accuracy(*fitted, served[rows_of_part], part_labels)
                row[f"{readout}_serve"] = (row[f"{readout}_serve_real"] + row[f"{readout}_serve_generated"]) / 2
                row[f"{readout}_learn"] = accuracy(learned, learned_labels, test_real, test_labels)
            rows.append(row | (found if way == "auto" else dict.fromkeys(found)))
    return rows


def report(result: dict) -> str:
    from gmail_hf.evaluation import provenance

    settings, mean, spread = result["settings"], result["mean"], result["standard_deviation"]
    readouts = {"logistic_probe": "probe", "nearest_centroid": "centroid"}
    parts = {"serve": "serve", "serve_real": "real part", "serve_generated": "generated part", "learn": "learn"}
    columns = {
        f"{key}_{part}": f"{short}, {title}" for key, short in readouts.items() for part, title in parts.items()
    }

    def cell(row: int, key: str) -> str:
        value = f"{mean[row][key]:.3f}"
        return value if len(settings["seeds"]) == 1 else f"{value} ± {spread[row][key]:.3f}"

    table = [
        "| images of unknown origin through | " + " | ".join(columns.values()) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row, values in enumerate(mean):
        table.append(f"| {values['row']} | " + " | ".join(cell(row, key) for key in columns) + " |")
    auto = next(row for row, values in enumerate(mean) if values["detector_accuracy"] is not None)
    shown = (f"{key} {value}" for key, value in settings.items() if key not in digits_alignment.SHOWN)
    return "\n".join(
        [
            f"# {settings['name']}: images of unknown origin",
            "",
            f"Accuracy of two readouts, mean ± standard deviation over the seeds "
            f"{', '.join(map(str, settings['seeds']))}. Serve: fitted on f_g(generated images of the training pairs), "
            "tested on as many generated as real images of unknown origin, and on the two parts. Learn: fitted on "
            "images of unknown origin, half of them generated, tested on f_r(real test images). Alignment and the "
            "detector have seen none of the images of unknown origin.",
            "",
            *table,
            "",
            f"The detector decides {cell(auto, 'detector_accuracy')} of the served images right (on held-out training "
            f"pairs {cell(auto, 'detector_heldout_accuracy')}); its expected calibration error there is "
            f"{cell(auto, 'detector_calibration_error')}.",
            "",
            f"- settings: {', '.join(shown)}",
            *provenance(result),
            "",
        ]
    )


def main(argv: list[str] | None = None) -> dict:
    own = ["--name", "digits-auto", "--variants", *VARIANTS]
    args = digits_alignment.parse_args([*own, *(sys.argv[1:] if argv is None else argv)], __doc__)
    return digits_alignment.run_seeds(args, run_seed, report)


if __name__ == "__main__":
    main()
