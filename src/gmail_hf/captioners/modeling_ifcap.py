"""
IFCap (Lee et al., EMNLP 2024) on a model with branches: captions from an image embedding and from similar captions.

It follows section 3 of the paper, independently of its code. The image retrieves captions from a bank. The prefix
attends to the nearest ones (fusion module), and a hard prompt lists the entities that are frequent in them
(frequency-based entity filtering). In training, a caption's embedding with noise replaces the image (image-like
retrieval). With GMAIL, f_g of an image generated from the caption replaces it.
"""

import os
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..publishing.hub import hub_kwargs, push_folder
from .bank import CaptionBank
from .configuration_ifcap import IFCapConfig
from .modeling_captioner import Captioner


class IFCapForConditionalGeneration(Captioner):
    """
    A [`Captioner`] with a [`CaptionBank`], which is saved and loaded with it.

    Create one with [`~Captioner.from_vision_text_pretrained`] and set its bank with
    [`~IFCapForConditionalGeneration.set_caption_bank`]. Load a trained one with `from_pretrained`.
    """

    config: IFCapConfig
    base_model_prefix = "ifcap"
    prefix_keywords = ("caption_rows",)
    caption_bank: CaptionBank | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """
        Load a checkpoint and its bank; arguments and errors as in [`StrictLoading.from_pretrained`] and
        [`CaptionBank.from_pretrained`].
        """
        bank = CaptionBank.from_pretrained(pretrained_model_name_or_path, **hub_kwargs(kwargs))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).set_caption_bank(bank)
        return loaded

    def set_caption_bank(self, bank: CaptionBank) -> None:
        """
        Set the bank to retrieve captions from.

        Raises:
            ValueError: its embeddings have the wrong dimension, or it has too few captions.
        """
        dim, needed = self.vision_model.embed_dim, max(self._num_retrieved) + 1
        if bank.embeds.shape[1] != dim or len(bank) < needed:
            raise ValueError(
                f"The caption bank has {len(bank)} captions with embeddings of dimension {bank.embeds.shape[1]}; this "
                f"model needs at least {needed} captions with embeddings of dimension {dim} from its own base."
            )
        self.caption_bank = bank

    @property
    def _num_retrieved(self) -> tuple[int, int]:
        return self.config.num_retrieved, self.config.num_entity_captions

    def _bank(self) -> CaptionBank:
        if self.caption_bank is None:
            raise ValueError("There is no caption bank. Set one with `set_caption_bank`.")
        return self.caption_bank

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save the checkpoint and the bank's two files; arguments as in `PreTrainedModel.save_pretrained`."""
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in kwargs}
        bank = self._bank()
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            bank.save(save_directory)
            if push_to_hub:  # transformers would upload before the bank is saved
                push_folder(save_directory, token=kwargs.get("token"), **hub)

    def make_prefix(
        self, image_embeds: torch.Tensor, caption_rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        [`Captioner.make_prefix`] with the hard prompt, padded on the right.

        Args:
            image_embeds (`torch.Tensor` of shape `(batch, embed_dim)`): image embeddings, which also retrieve
                captions.
            caption_rows (`torch.LongTensor` of shape `(batch,)`, *optional*): see
                [`~IFCapForConditionalGeneration.forward`].
        """
        bank, (fused, counted) = self._bank(), self._num_retrieved
        found = bank.retrieve(image_embeds.detach(), max(fused, counted), exclude=caption_rows)
        retrieved = bank.on(image_embeds.device)[found[:, :fused]]  # (batch, num_retrieved, embed_dim)
        prefix = self.mapping_network(self._scaled(image_embeds), self._scaled(retrieved))
        if caption_rows is not None:
            entities = [bank.entities[row] for row in caption_rows.tolist()]
        else:
            entities = [
                bank.frequent_entities(rows, self.config.entity_threshold) for rows in found[:, :counted].tolist()
            ]
        prompts = [torch.tensor(bank.prompt(names), dtype=torch.long) for names in entities]
        ids = pad_sequence(prompts, batch_first=True).to(prefix.device)  # (batch, prompt)
        lengths = torch.tensor([prefix.shape[1] + len(prompt) for prompt in prompts], device=prefix.device)
        prompted = torch.cat([prefix, self.get_input_embeddings()(ids).to(prefix.dtype)], dim=1)
        return prompted, (torch.arange(prompted.shape[1], device=prefix.device) < lengths[:, None]).long()

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        caption_rows: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        [`Captioner.forward`] with one more argument for training.

        Args:
            pixel_values, input_ids, attention_mask, labels, image_embeds, kwargs: as in [`Captioner.forward`].
            caption_rows (`torch.LongTensor` of shape `(batch,)`, *optional*): the captions' row numbers in the bank.
                An image then does not retrieve its own caption, and the hard prompt lists the entities of that
                caption instead of frequent ones. Without images and image embeddings, the captions' embeddings with
                noise of `config.noise_variance` replace them, for training on text only.
        """
        if caption_rows is not None and pixel_values is None and image_embeds is None:
            clean = self._bank().on(self.device)[caption_rows]
            image_embeds = clean + torch.randn_like(clean) * self.config.noise_variance**0.5
        return super().forward(
            pixel_values, input_ids, attention_mask, labels, image_embeds, caption_rows=caption_rows, **kwargs
        )
