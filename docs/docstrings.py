"""Docstrings are written as transformers' are; the site shows their links and types the way mkdocstrings does."""

import ast
import re

import griffe

# [`GmailCLIPModel`], [`~GmailCLIPModel.from_clip`]
LINK = re.compile(r"\[`(~?)([\w.]+)`\](?:\(\w+\.py\))?")
# The head of an item that continues in the next line; mkdocstrings looks for its colon in the first.
HEAD = re.compile(r"^( {4}\w[^:\n]*)\n {8}(?=[^\n]*:)", flags=re.MULTILINE)
# name (`int`, *optional*, defaults to 4): mkdocstrings reads the default from the signature
TYPE = re.compile(r"^( +[\w, ]+ )\((.*`.*)\):", flags=re.MULTILINE)
OPTIONAL = re.compile(r", \*optional\*|, defaults to [^)]*$|\[?`\]?")


class TransformersDocstrings(griffe.Extension):
    """Links go to the name as its module sees it, or the package; without such an entry they are plain code."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = HEAD.sub(r"\1 ", obj.docstring.value)
            text = TYPE.sub(lambda match: f"{match[1]}({OPTIONAL.sub('', match[2])}):", text)
            obj.docstring.value = LINK.sub(lambda match: self._link(obj, *match.groups()), text)

    def on_module(self, *, mod: griffe.Module, **kwargs) -> None:
        """The package's public names load on first use; the site finds them where they are defined."""
        if mod.path == "gmail_hf":
            for module, names in ast.literal_eval(str(mod["PUBLIC_NAMES"].value)).items():
                for name in names:
                    mod.set_member(name, griffe.Alias(name, f"gmail_hf.{module}.{name}", parent=mod))

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs) -> None:
        """A training argument is described by its help, as on the command line."""
        if attr.module.path.startswith("gmail_hf.training") and isinstance(attr.value, griffe.ExprCall):
            keywords = [argument for argument in attr.value.arguments if isinstance(argument, griffe.ExprKeyword)]
            fields = {keyword.name: keyword.value for keyword in keywords}
            if "metadata" in fields:
                attr.docstring = griffe.Docstring(ast.literal_eval(str(fields["metadata"]))["help"], parent=attr)
                attr.value = fields["default"]

    def _link(self, obj: griffe.Object, short: str, name: str) -> str:
        first, _, rest = name.partition(".")
        try:
            target = obj.resolve(first)
        except griffe.NameResolutionError:
            target = f"gmail_hf.{first}"
        target = f"{target}.{rest}" if rest else target
        shown = name.rpartition(".")[-1] if short else name
        return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
