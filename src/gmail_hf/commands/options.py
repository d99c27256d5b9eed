"""Options of commands: dataclass fields as flags, read from a YAML file and the command line, in groups for --help."""

import argparse
import dataclasses
import difflib
import json
import logging
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

CONFIGS = Path(__file__).with_name("configs")
# Flags of the first releases. They work for one more release, with a warning.
OLD_SPELLINGS = {
    "model_name_or_path": "model",
    "gmail_name_or_path": "model",
    "revision": "model_revision",
    "gmail_revision": "model_revision",
    "llava_name_or_path": "llava",
    "text_model_name_or_path": "text_model",
    "dataset_name": "dataset",
    "dataset_config_name": "dataset_config",
    "dataset_split": "split",
    "train_split": "split",
    "private": "hub_private_repo",
}
EPILOG = "--debug shows the traceback of an error."
METAVARS = {"str": "TEXT", "string_to_bool": "BOOL"}

REQUIRED = dataclasses.MISSING

logger = logging.getLogger("gmail_hf")


def option(help: str, default: Any = None, **more: Any) -> Any:
    """Return a dataclass field with its `help`, its default or `REQUIRED`, and keywords of `add_argument`."""
    kind = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**kind, metadata={"help": help, **more})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's layout, lists each option once, and omits defaults such as None and False."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required:
            return f"{action.help} (required)"
        has_default = action.default is not None and action.default is not False and action.default not in ("", [])
        return super()._get_help_string(action) if has_default else action.help or ""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        name = getattr(action.type, "__name__", "value")
        return METAVARS.get(name, name.upper())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        flag = next(flag for flag in action.option_strings if flag.startswith("--"))
        return f"{flag} {value}".rstrip()


class OptionParser(HfArgumentParser):
    """
    `HfArgumentParser` with one group per dataclass and options of transformers last. Errors are raised.

    Args:
        command: name of the command.
        description: text for `--help`.
        dataclass_types: dataclasses whose fields become options. Their attribute `_argument_group_name` is the title
            of the group.
    """

    def __init__(self, command: str, description: str | None, dataclass_types: Sequence[type] = ()):
        super().__init__(
            dataclass_types,
            prog=f"gmail-hf {command}",
            usage="%(prog)s [--OPTION VALUE ...]",
            description=description,
            epilog=EPILOG,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def _add_dataclass_arguments(self, dtype: type) -> None:
        hints = typing.get_type_hints(dtype)
        groups = {}
        fields = {field: _declared_by(dtype, field.name) for field in dataclasses.fields(dtype) if field.init}
        for field, owner in sorted(fields.items(), key=lambda item: item[1].__module__.startswith("transformers.")):
            title = getattr(owner, "_argument_group_name", f"{owner.__module__.partition('.')[0]}.{owner.__name__}")
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            field.type = hints[field.name]
            self._parse_dataclass_field(groups[title], field)

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """
        Raises:
            ValueError: an unknown option. The message suggests the most similar one.
        """
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
            if flag is None:
                self.error(f"unexpected argument '{unknown[0]}'; see {self.prog} --help")
            self.error(f"unknown option {flag}; {self._nearest(flag.replace('-', '_').lstrip('_'))}")
        return namespace, unknown

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name, [action.dest for action in self._actions], 1)
        return f"did you mean --{near[0]}?" if near else f"see {self.prog} --help"

    def renamed(self, name: str) -> str:
        """Return the current name of an option. Old names cause a warning."""
        known = {action.dest for action in self._actions}
        new = OLD_SPELLINGS.get(name)
        if name in known or new not in known:
            return name
        logger.warning(f"--{name} is now called --{new}; the old name will be removed in the next release.")
        return new

    def renamed_words(self, argv: Sequence[str]) -> list[str]:
        """Replace old names of options in a command line, and dashes in names by underscores."""
        words = []
        for word in argv:
            flag, is_given, value = word.partition("=")
            is_flag = flag.startswith("--")
            words.append(f"--{self.renamed(flag[2:].replace('-', '_'))}{is_given}{value}" if is_flag else word)
        return words

    def words_of(self, config: str | os.PathLike) -> list[str]:
        """
        Convert the options in a YAML file to words of a command line.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is not a mapping of known options.
        """
        path = config_file(config)
        if not path.exists():
            raise FileNotFoundError(
                f"--config '{config}' does not exist: pass a YAML file, or one of {', '.join(bundled_configs())}. The "
                "paper's settings are in examples/configs of the repository."
            )
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
        if not isinstance(values, dict):
            self.error(f"{config} has no 'option: value' lines")
        known = {action.dest: action for action in self._actions if action.dest not in ("config", "help")}
        words = []
        for name, value in values.items():
            name = self.renamed(str(name))
            if name not in known:
                self.error(f"{config} has the unknown option '{name}'; {self._nearest(name)}")
            if isinstance(value, list) and known[name].nargs is None:  # an option such as report_to: a text or a list
                self.set_defaults(**{name: value})
            elif isinstance(value, list):
                words += [f"--{name}", *map(str, value)] if value else []
            elif value is not None:
                words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        return words


def config_file(name: str | os.PathLike) -> Path:
    """Return the YAML file of a `--config`, given its path or the name of a bundled configuration."""
    path = Path(name)
    if path.parent.parts[-2:] == ("examples", "configs") and path.stem in bundled_configs() and not path.exists():
        logger.warning(f"{path} is now part of the package: use --config {path.stem}.")
        path = Path(path.stem)
    return CONFIGS / f"{path}.yaml" if str(path) in bundled_configs() else path


def parse(
    argv: Sequence[str],
    command: str,
    description: str | None,
    dataclass_types: Sequence[type],
    default_config: str | None = None,
    stages: dict[str, dict[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """
    Create an instance of each dataclass from the YAML file of `--config` and the command line, which takes precedence.

    Args:
        argv: the command line without the command's name.
        command, description, dataclass_types: see [`OptionParser`].
        default_config: default for `--config` if neither `--config` nor `--dataset` is given.
        stages: defaults of other options for each value of the option `stage`.

    Raises:
        SystemExit: after `--help`.
        ValueError: an unknown option or stage, a value of the wrong type, or a repeated option that takes a list.
        OSError: the file of `--config` does not exist.
    """
    parser = OptionParser(command, description, dataclass_types)
    parser.add_argument("--config", help=f"YAML file of these options, or one of {', '.join(bundled_configs())}.")
    words = parser.renamed_words(argv)
    for name in (action.dest for action in parser._actions if action.nargs == "+"):
        if sum(word.partition("=")[0] == f"--{name}" for word in words) > 1:  # argparse would drop all but the last
            parser.error(f"--{name} is given more than once; list all values after one --{name}")
    config = given(words, "config")
    if config is None and given(words, "dataset") is None:
        config = default_config
    if config is not None:
        words = [*parser.words_of(config), *words]
    # Shells replace ~ only at the start of a word, and YAML files never.
    words = [re.sub(r"^(--\w+=)(~/.*)", lambda word: word[1] + os.path.expanduser(word[2]), word) for word in words]
    if stages is not None:
        stage = given(words, "stage") or next(iter(stages))
        if stage not in stages:
            parser.error(f"unknown stage '{stage}'; choose from {list(stages)}")
        parser.set_defaults(**stages[stage])
    *parsed, _ = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    return tuple(parsed)


def bundled_configs() -> list[str]:
    """Return the names of the bundled configurations."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def given(words: Sequence[str], option: str) -> str | None:
    """The value of an option on a command line that is not parsed yet."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument(f"--{option}", nargs="?")
    return getattr(first.parse_known_args(words)[0], option)


def _declared_by(dtype: type, field: str) -> type:
    """Return the class from which a dataclass inherits a field."""
    return next(
        owner
        for owner in reversed(dtype.__mro__)
        if field in [known.name for known in (dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ())]
    )
