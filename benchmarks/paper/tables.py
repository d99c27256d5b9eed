"""The tables: rows from recipes.py, the numbers of the paper, and the commands for COCO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recipes import (
    ON_REAL,
    TAKEN_FOR_REAL,
    ablations,
    alignment,
    alignment_ablation,
    captioning,
    cost,
    ifcap_captioning,
    llama_questions,
    llava_questions,
    long_retrieval,
    probes,
    retrieval,
    retrieval_by_scale,
    siglip_captioning,
    siglip_retrieval,
    vlm_questions,
    zero_shot,
)
from runs import Runs


@dataclass(frozen=True)
class Table:
    """
    How to make one or several tables of the paper.

    Args:
        numbers: The numbers of the paper's tables.
        title: What is measured.
        rows: Function from the runs of one seed to dicts of scores, with the row's name under `row`.
        headline: The scores for which the gap closed is reported.
        paper: The paper's figures as a Markdown table; empty if they cannot be compared.
        note: Lines on how this differs from the paper.
    """

    numbers: tuple[int, ...]
    title: str
    rows: Callable[[Runs], list[dict]]
    headline: tuple[str, ...] = ()
    paper: str = ""
    note: tuple[str, ...] = ()

    @property
    def heading(self) -> str:
        numbers = ", ".join(map(str, self.numbers))
        return f"Table{'s' * (len(self.numbers) > 1)} {numbers}: {self.title}"


def reported(columns: Sequence[str], *rows: Sequence[str | float]) -> str:
    """A Markdown table of figures of the paper."""
    lines = ["| " + " | ".join(["", *columns]) + " |", "|---|" + "---:|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


CAPTIONS, RECALLS = ("B@4", "METEOR", "CIDEr", "SPICE"), ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10")
TABLES = (
    Table(
        (1,),
        "captioning (ClipCap)",
        captioning,
        ("exact_match", "CIDEr"),
        reported(
            CAPTIONS,
            ("ClipCap", 32.15, 27.10, 108.35, 20.12),
            ("ClipCap + GMAIL", 38.12, 31.67, 119.53, 23.75),
            ("LLaVA", 39.67, 32.38, 134.29, 24.17),
            ("LLaVA + GMAIL", 43.26, 34.89, 146.38, 27.23),
            ("Llama-3", 47.36, 35.21, 158.13, 28.35),
            ("Llama-3 + GMAIL", 50.21, 38.59, 168.53, 32.58),
        ),
        ("LLaVA and Llama 3 are in Tables 10 and 15. IFCap has its own table.", ""),
    ),
    Table(
        (1,),
        "captioning (IFCap)",
        ifcap_captioning,
        ("exact_match", "CIDEr"),
        reported(
            (*CAPTIONS, "ROUGE-L", "WMD"),
            ("IFCap", 33.25, 28.60, 115.27, 21.58, 51.35, 56.72),
            ("IFCap + GMAIL", 39.32, 32.07, 127.86, 23.98, 59.83, 63.51),
        ),
        (
            "Implemented from the description in IFCap's paper. The bank holds the training captions, and the "
            "entities are the ten digits. In training the prompt names the digits of the caption, as in IFCap; for an "
            "image it names the digits of the captions it retrieves. Text only: training uses caption embeddings with "
            "noise instead of image embeddings.",
            "",
        ),
    ),
    Table(
        (2, 3, 5),
        "zero-shot retrieval (CLIP's text side)",
        retrieval,
        ("image_to_text_R@1", "text_to_image_R@1"),
        reported(
            RECALLS,
            ("COCO, CLIP", 51.8, 76.8, 84.3, 32.7, 57.7, 68.2),
            ("COCO, CLIP + GMAIL", 56.8, 80.1, 87.2, 37.5, 62.7, 73.2),
            ("Flickr30k, CLIP", 44.1, 68.2, 77.0, 24.7, 45.1, 54.6),
            ("Flickr30k, CLIP + GMAIL", 47.1, 71.2, 79.6, 30.2, 50.3, 60.5),
        ),
        ("One world represents COCO and Flickr30k; long captions have their own table.", ""),
    ),
    Table(
        (3, 5),
        "zero-shot retrieval by long captions (Long-CLIP)",
        long_retrieval,
        ("image_to_text_R@1", "text_to_image_R@1"),
        reported(
            RECALLS,
            ("Flickr30k, Long-CLIP", 47.2, 71.5, 80.0, 33.1, 55.6, 64.9),
            ("Flickr30k, Long-CLIP + GMAIL", 51.6, 75.3, 83.6, 39.3, 61.5, 71.8),
            ("ShareGPT4V, Long-CLIP", 94.6, "", "", 93.3, "", ""),
            ("ShareGPT4V, Long-CLIP + GMAIL", 97.2, "", "", 96.1, "", ""),
        ),
        (
            "The bundled CLIP, stretched to 96 text positions and fine-tuned on long captions of real scenes. The "
            "captions also name places and ground. The images were generated from the short captions, so their places "
            "and ground differ.",
            "",
        ),
    ),
    Table(
        (4,),
        "zero-shot classification",
        zero_shot,
        ("digits",),
        reported(
            ("DTD", "Cars", "SUN397", "Food101", "Aircraft", "Pets", "Caltech101", "ImageNet"),
            ("CLIP", 55.20, 77.53, 69.31, 93.08, 32.88, 93.33, 93.24, 75.54),
            ("CLIP + GMAIL", 65.26, 81.32, 75.53, 95.21, 37.85, 95.23, 95.57, 77.68),
        ),
    ),
    Table(
        (4,),
        "linear probe on a vision-only tower (SynCLR)",
        probes,
        ("digits", "colors"),
        reported(
            ("DTD", "Cars", "SUN397", "Food101", "Aircraft", "Pets", "Caltech101", "ImageNet (fine-tuned)"),
            ("SynCLR", 79.90, 93.80, 76.20, 91.60, 81.70, 93.60, 95.30, 85.80),
            ("SynCLR + GMAIL", 83.67, 96.56, 81.25, 96.38, 86.75, 95.70, 98.35, 87.95),
        ),
        (
            "A small ViT, trained from scratch with SynCLR's contrastive loss, on real scenes instead of generated "
            "ones. The probe follows SynCLR's protocol.",
            "",
        ),
    ),
    Table(
        (8,),
        "zero-shot retrieval on a SigLIP",
        siglip_retrieval,
        ("image_to_text_R@1", "text_to_image_R@1"),
        note=(
            "A small SigLIP, trained from scratch on real scenes. The paper reports captions by a SigLIP; they have "
            "their own table.",
            "",
        ),
    ),
    Table(
        (8,),
        "captioning on a SigLIP (ClipCap)",
        siglip_captioning,
        ("exact_match", "CIDEr"),
        reported(("B@4", "CIDEr"), ("SigLIP", 37.51, 117.82), ("SigLIP + GMAIL", 42.35, 125.68)),
        ("The small SigLIP of the table above.", ""),
    ),
    Table(
        (7,),
        "retrieval by the number of training pairs",
        retrieval_by_scale,
        ("image_to_text_R@1", "text_to_image_R@1"),
        reported(
            ("i2t R@1", "t2i R@1"),
            ("CLIP + GMAIL, COCO (560k pairs)", 47.1, 30.2),
            ("CC3M (3.3M)", 48.6, 32.6),
            ("CC12M (12M)", 50.9, 34.9),
        ),
        ("The paper tests on Flickr30k. Here all rows have the same number of steps.", ""),
    ),
    Table(
        (9,),
        "captioning, with and without alignment",
        alignment_ablation,
        ("exact_match", "CIDEr"),
        reported(
            ("B@4", "CIDEr", "SPICE"),
            ("synthetic, no alignment", 36.15, 115.35, 22.95),
            ("synthetic, dual projection + alignment", 38.12, 119.53, 23.75),
            ("real, no alignment", 38.24, 119.78, 23.86),
            ("real, dual projection + alignment", 38.37, 119.95, 23.98),
        ),
        ("In the paper's numbers GMAIL closes 0.94 of the gap in B@4 and in CIDEr.", ""),
    ),
    Table(
        (6, 8, 11, 13, 16, 17),
        "captioning, ablations",
        ablations,
        ("exact_match", "CIDEr"),
        reported(
            ("B@4", "CIDEr", "SPICE"),
            ("same steps: no alignment", 35.76, 113.42, 22.63),
            ("same steps: GMAIL", 37.92, 117.6, 23.42),
            ("LoRA rank 2 / 4 / 6 / full fine-tuning", "", "117.62 / 119.53 / 119.12 / 118.95", ""),
            ("Task2Sim (mixing)", 36.65, 115.72, 23.02),
            ("FLUX images, no alignment", 37.20, 117.82, 23.40),
            ("FLUX images, GMAIL", 39.54, 122.36, 24.15),
        ),
        (
            "The paper's ablations of captioning in one table: branches, mixing, rank, number of pairs, generator. "
            "All rows have the same number of steps. Full fine-tuning is LoRA with the layers' full rank. The better "
            "generator is the bundled one with its best sampling settings.",
            "",
        ),
    ),
    Table(
        (10,),
        "questions about images, a projector to a frozen language model (Llama 3's bridge)",
        llama_questions,
        ("caption", "all"),
        reported(
            ("ScienceQA",), ("LLaVA", 85.2), ("LLaVA + GMAIL", 87.6), ("Llama-3", 88.5), ("Llama-3 + GMAIL", 91.2)
        ),
    ),
    Table(
        (15,),
        "questions about images, projector and LoRA of a LLaVA",
        llava_questions,
        ("caption", "all"),
        reported(("MMMU",), ("LLaVA", 44.7), ("LLaVA + GMAIL", 48.3)),
        ("The LLaVA was trained on captions of the real training images first, like a published one.", ""),
    ),
    Table(
        (10, 15),
        "questions about images, connector and LoRA of a vision-language model of today",
        vlm_questions,
        ("caption", "all"),
        note=(
            "A small Idefics 3, the architecture of SmolVLM, trained on captions of real scenes first "
            "(benchmarks/digits/train_vlm.py). Stage 1 is `gmail-hf train` on the model's own tower, 80 steps of 64 "
            "pairs. Stage 2 is TRL's SFTTrainer, 150 steps of 32 questions.",
            "",
        ),
    ),
    Table(
        (12,),
        "cost of training",
        cost,
        paper=reported(
            ("hours", "steps", "GB"),
            ("GMAIL", 10, "60k", 28),
            ("generated + real, no alignment", 12, "70k", 26),
            ("real", 8, "50k", 24),
        ),
        note=("One CPU thread here. The paper trained on all of COCO with an A100-80GB.", ""),
    ),
    Table(
        (14,),
        "held-out pairs: pooled embeddings, and the patch tokens that LLaVA reads",
        alignment,
        paper=reported(("paired cosine",), ("without alignment", 0.52), ("with alignment", 0.89)),
    ),
)


def coco_commands(table: Table) -> list[str]:
    """
    The commands for a table on COCO with the paper's settings. They need the Hub and GPUs.

    Lines that start with # describe data to provide and manual steps.
    """
    launch, config, pairs = "accelerate launch -m gmail_hf.commands", "--config examples/configs", "--dataset coco-sd2"

    def generate(name: str, split: str = "train") -> str:
        captions = f"--dataset org/{name}-captions --split {split} --real_image_column image"
        return f"{launch}.generate {captions} --output_dir {name}-sd2"

    def align(name: str, base: str = "", folder: str = "") -> str:
        model = f" --model {base}" if base else ""
        return f"{launch}.train {config}/{name}.yaml{model} --dataset {name}-sd2 --output_dir gmail-{folder or name}"

    def adapt(name: str, base: str = "", folder: str = "") -> list[str]:
        """Commands from captions to a fine-tuned text encoder."""
        folder = folder or name
        text = f"--stage text --model gmail-{folder} --dataset {name}-sd2"
        text = f"{launch}.train {text} --output_dir gmail-{folder}-text"
        return [generate(name), align(name, base, folder), text]

    def score(model: str, benchmarks: str, options: str = "") -> str:
        options += f" --output_dir {model}-scores"
        return f"gmail-hf evaluate --model {model} --benchmarks {benchmarks}{options}"

    # Stage 2 ends with the real images of the validation split.
    both = [generate("coco"), generate("coco", "validation")]

    def caption(kind: str, base: str = "", folder: str = "coco", **more: Sequence[str]) -> list[str]:
        lines = [*both, align("coco", base, folder)]
        rows = {folder: (), f"{folder}-taken-for-real": TAKEN_FOR_REAL, f"{folder}-real": ON_REAL, **more}
        for name, options in rows.items():
            words = " ".join((f"--model gmail-{folder}", pairs, *options, f"--output_dir {kind}-{name}"))
            lines += [f"{launch}.caption {config}/{kind}_coco.yaml {words}", score(f"{kind}-{name}", "coco")]
        return lines

    captioners = caption("clipcap")
    long_benchmarks = "coco,flickr30k,sharegpt4v", " --dataset sharegpt4v=FOLDER"
    long_captions = [
        "# FOLDER: share-captioner_coco_lcs_sam_1246k_1107.json of Lin-Chen/ShareGPT4V, and its first 1,000 images.",
        score("gmail-coco-text", *long_benchmarks),
    ]
    classes = "dtd,cars,sun397,food101,aircraft,pets,caltech101,imagenet"
    scales = [[*adapt(name), score(f"gmail-{name}-text", "flickr30k")] for name in ("coco", "cc3m", "cc12m")]
    tower = f"{launch}.train {config}/coco_llava.yaml {pairs} --output_dir gmail-coco-336"
    llama = f"{launch}.vlm {config}/llama3_8b.yaml --model gmail-coco {pairs}"
    llava = f"{launch}.vlm {config}/llava_1.5_7b.yaml --model gmail-coco-336 {pairs}"
    answers = {name: score(name, "scienceqa,mmmu", " --dtype bfloat16") for name in ("llama3-coco", "llava-coco")}
    ablations = [
        "# One branch: --train_real --generated_modality real in stage 1, then the captioner with --modality real.",
        "# Another rank: --lora_rank 2 --lora_alpha 4 in stage 1; fewer pairs: --max_train_samples in both stages.",
        "# Another generator: --generator, and everything else on its pairs.",
        "# Mixing, by hand: pairs with a column of alternating images, then --modality real --image_column COLUMN.",
    ]
    siglip = "google/siglip-so400m-patch14-384", "siglip-coco"
    longclip = adapt("coco", "zer0int/LongCLIP-GmP-ViT-L-14", "long-coco")
    commands = {
        "captioning": captioners,
        "ifcap_captioning": caption("ifcap", **{"text-only-coco": ("--text_only", "true")}),
        "siglip_retrieval": [*adapt("coco", *siglip), score("gmail-siglip-coco-text", "coco")],
        "siglip_captioning": caption("clipcap", *siglip),
        "retrieval": [*adapt("coco"), *long_captions],
        "long_retrieval": [*longclip, long_captions[0], score("gmail-long-coco-text", *long_benchmarks)],
        "probes": [
            generate("coco"),
            "# ./synclr: made from the official checkpoint by gmail_hf.convert_synclr.",
            align("coco", "./synclr", "synclr-coco"),
            score("gmail-synclr-coco", classes),
        ],
        "zero_shot": [*adapt("coco"), score("gmail-coco-text", classes)],
        "retrieval_by_scale": sum(scales, []),
        "alignment_ablation": [*captioners, "# Both branches trained: --train_real in stage 1, then the captioners."],
        "ablations": [*captioners, *ablations],
        "llama_questions": [*both, align("coco"), f"{llama} --output_dir llama3-coco", answers["llama3-coco"]],
        "vlm_questions": [
            generate("coco"),
            align("coco", "HuggingFaceTB/SmolVLM-256M-Instruct", "smolvlm-coco"),
            "# Stage 2, by TRL's SFTTrainer: docs/guides/any_vlm.md.",
        ],
        "llava_questions": [*both, tower, f"{llava} --output_dir llava-coco", answers["llava-coco"]],
        "cost": [generate("coco"), align("coco"), "# The cost of a training is in its folder: train_results.json."],
        "alignment": [
            *(generate("coco"), generate("coco", "test"), align("coco")),
            score("gmail-coco", "coco", " --dataset coco=coco-sd2"),
        ],
    }
    captions = "# org/NAME-captions: images and captions on the Hub, split train, and of COCO validation and test too."
    return [captions, *commands[table.rows.__name__]]
