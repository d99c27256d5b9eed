"""`GmailTrainingArguments`: the paper's settings as defaults of `TrainingArguments`, and the losses of GMAIL."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .losses import GmailLossConfig

PAPER_STEPS = 50_000
LOWER_IS_BETTER = ("centroid_distance", "median_rank")  # metrics; transformers knows only losses


@dataclass
class GmailTrainingArguments(GmailLossConfig, TrainingArguments):
    """
    `TrainingArguments` with the paper's settings as defaults (GMAIL, section 4.1), and the fields of
    [`GmailLossConfig`].

    Changed defaults: `learning_rate=1e-4`, `weight_decay=0.01`, `per_device_train_batch_size=256`,
    `per_device_eval_batch_size` equal to it, `max_steps=50_000` unless `num_train_epochs` is given,
    `lr_scheduler_type="cosine_with_restarts"` with 5 cycles, `logging_steps=50`, `remove_unused_columns=False`,
    `greater_is_better=False` for a `metric_for_best_model` that is a distance or a median rank. As in transformers,
    `max_steps` takes precedence over `num_train_epochs` if both are given. Each field is described by its `help`,
    which `HfArgumentParser` shows.

    Raises:
        ValueError: an option is out of range or contradicts another.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Pairs per device and step."})
    per_device_eval_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs per device in evaluation, and images per device when embeddings are cached; defaults to "
            "--per_device_train_batch_size."
        },
    )
    num_train_epochs: float = field(
        default=-1,
        metadata={"help": "Number of epochs, used if --max_steps is not given; defaults to 3 if --max_steps is -1."},
    )
    max_steps: int | None = field(
        default=None,
        metadata={
            "help": "Number of steps, which takes precedence over --num_train_epochs; defaults to 50,000 if neither "
            "is given; -1 trains for --num_train_epochs."
        },
    )
    lr_scheduler_type: str = field(default="cosine_with_restarts", metadata={"help": "The learning rate schedule."})
    logging_steps: float = field(default=50, metadata={"help": "Number of steps between log entries."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: the collator needs the columns."}
    )
    generated_modality: str = field(
        default="gen",
        metadata={"help": "Branch for generated images; 'real' is the baseline that treats them as real."},
    )
    token_layer: int = field(
        default=-2,
        metadata={"help": "Index into `hidden_states` of the patch tokens for --token_weight; LLaVA uses -2."},
    )
    contrastive_mini_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Images per forward pass; the complete batch is contrasted with the memory of a mini-batch."
        },
    )
    pairing: str = field(
        default="caption",
        metadata={
            "help": "'caption' keeps the pairs of the data set; 'optimal' re-pairs generated and real images within "
            "each caption; 'none' is for images that share only a caption or class, and draws new real images of "
            "that caption in each epoch. 'optimal' and 'none' need --cache_real_embeds."
        },
    )
    images_per_caption: int = field(
        default=1,
        metadata={
            "help": "Number of pairs of the same caption to put into a batch together, if there are that many, for "
            "losses that compare the distributions of each caption."
        },
    )
    cache_real_embeds: bool = field(
        default=True,
        metadata={
            "help": "Embed the images of a frozen branch, such as `real`, once and cache the embeddings on disk."
        },
    )
    on_bad_image: str = field(
        default="skip", metadata={"help": "'skip' skips pairs with an unreadable image; 'error' raises an error."}
    )
    log_figures: bool = field(
        default=False, metadata={"help": "Log figures of evaluation pairs and their embeddings to --report_to."}
    )

    def __post_init__(self) -> None:
        if self.per_device_eval_batch_size is None:  # values of Eq. 1 are comparable only for the same batch size
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.max_steps is None:
            self.max_steps = -1 if self.num_train_epochs >= 0 else PAPER_STEPS
        if self.num_train_epochs < 0 and self.max_steps < 0:
            self.num_train_epochs = TrainingArguments.num_train_epochs
        if self.lr_scheduler_type == "cosine_with_restarts" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"num_cycles": 5}
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(LOWER_IS_BETTER):
            self.greater_is_better = False
        GmailLossConfig.__post_init__(self)
        TrainingArguments.__post_init__(self)
        # Each process reads its own batches. With a streamed data set, accelerate's main process would slice one batch
        # for all of them, which fails if pairs are skipped or captions differ in length.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the collator needs the data set's columns.")
        if self.contrastive_mini_batch_size is not None and self.contrastive_mini_batch_size < 1:
            raise ValueError(
                f"The contrastive mini-batch size must be at least 1, got {self.contrastive_mini_batch_size}."
            )
        if self.pairing not in ("caption", "optimal", "none"):
            raise ValueError(f"`pairing` must be 'caption', 'optimal' or 'none', got '{self.pairing}'.")
        if self.pairing != "caption" and not (self.cache_real_embeds and self.aligns and self.token_weight == 0):
            raise ValueError(
                f'`pairing="{self.pairing}"` needs `cache_real_embeds=True`, a loss that aligns images, and '
                "`token_weight=0`."
            )
        if self.pairing == "none" and self.align_weight + self.consistency_weight > 0:
            raise ValueError(
                '`pairing="none"` cannot be used with `align_weight` or `consistency_weight`, which compare pairs. '
                'Use `recipe="robust"`, or `align_weight=0` and `energy_weight`.'
            )
        if self.pairing == "none" and self.dataloader_persistent_workers:
            raise ValueError(
                '`pairing="none"` draws other images in each epoch, but persistent workers would keep those of the '
                "first: set `dataloader_persistent_workers=False`."
            )
        if not 1 <= self.images_per_caption <= self.per_device_train_batch_size:
            raise ValueError(
                f"`images_per_caption` must be between 1 and the batch size of {self.per_device_train_batch_size}, "
                f"got {self.images_per_caption}."
            )
        if self.on_bad_image not in ("skip", "error"):
            raise ValueError(f"`on_bad_image` must be 'skip' or 'error', got '{self.on_bad_image}'.")

    @property
    def branches(self) -> dict[str, str]:
        """The branch of `real` and of `generated` images."""
        return {"real": "real", "generated": self.generated_modality}
