"""
Register the models of this package with transformers' Auto classes, without importing them.

Each module registers its models with the Auto classes when it is imported. Here, transformers' table of model types is
extended to import the module of a type when it is looked up.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TABLE = "transformers.models.auto.configuration_auto"
MODULES = {
    "gmail_clip": "models.clip",
    "gmail_clip_vision_model": "models.clip",
    "gmail_metaclip_2": "models.metaclip",
    "gmail_siglip": "models.siglip",
    "gmail_siglip2": "models.siglip",
    "gmail_dinov2": "models.vision",
    "gmail_dinov2_with_registers": "models.vision",
    "gmail_dinov3_vit": "models.vision",
    "gmail_vit": "models.vision",
    "gmail_clipcap": "captioners",
    "gmail_ifcap": "captioners",
    "gmail_llava": "vlm",
}


class _OnDemand(dict):
    """The registered configurations by model type. Looking up a type of this package first imports its module."""

    def __contains__(self, model_type: Any) -> bool:
        if str(model_type).startswith("gmail_attached_"):  # `ATTACHED` in branches/configuration.py
            raise ValueError(
                f"'{model_type}' is the type of branches that were saved without their model. Load both with "
                "`gmail_hf.from_vlm(model, gmail=branches)`, or the branches into a loaded model with "
                "`gmail_hf.load_branches(model, branches)`."
            )
        if not super().__contains__(model_type) and model_type in MODULES:
            importlib.import_module(f".{MODULES[model_type]}", __package__)
        return super().__contains__(model_type)


class _AfterImport(MetaPathFinder):
    """Extends transformers' table of model types when its module is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        run = spec.loader.exec_module

        def run_and_extend(module: ModuleType) -> None:
            run(module)
            _extend(module)

        spec.loader.exec_module = run_and_extend
        return spec


def _extend(table: ModuleType) -> None:
    table.CONFIG_MAPPING._extra_content = _OnDemand(table.CONFIG_MAPPING._extra_content)


def register_on_demand() -> None:
    """Let the Auto classes find this package's models, whether or not transformers is already imported."""
    if TABLE in sys.modules:
        _extend(sys.modules[TABLE])
    else:
        sys.meta_path.insert(0, _AfterImport())
