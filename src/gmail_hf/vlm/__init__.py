"""LLaVA and Llama 3 on GMAIL's vision tower with two branches: train on generated images, serve photographs."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

from .chat import LLAMA3_CHAT_TEMPLATE, with_images
from .configuration_gmail_llava import GmailLlavaConfig
from .conversation_trainer import ConversationTrainer
from .conversations import Conversations
from .modeling_gmail_llava import GmailLlavaForConditionalGeneration
from .processing import build_processor, check_processor
from .training import LlavaCollator, ModalityCollator, language_model_lora
from .vllm import save_for_vllm

AutoConfig.register("gmail_llava", GmailLlavaConfig)
AutoModelForImageTextToText.register(GmailLlavaConfig, GmailLlavaForConditionalGeneration)
AutoProcessor.register(GmailLlavaConfig, LlavaProcessor)

__all__ = [
    "LLAMA3_CHAT_TEMPLATE",
    "ConversationTrainer",
    "Conversations",
    "GmailLlavaConfig",
    "GmailLlavaForConditionalGeneration",
    "LlavaCollator",
    "ModalityCollator",
    "build_processor",
    "check_processor",
    "language_model_lora",
    "save_for_vllm",
    "with_images",
]
