"""`gmail-hf COMMAND ...`: runs a command and prints a user's mistake as one line."""

import difflib
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..version import __version__

COMMANDS = {
    "generate": "generate an image for each caption of a data set, in shards",
    "curate": "select generated images: no broken, copied or wrongly captioned ones",
    "push": "upload generated shards and their card to the Hub",
    "diagnose": "measure the gap of generated images, and recommend what to do",
    "prepare": "decode pairs in advance, so that training does not have to",
    "train": "align the gen branch (stage 1), adapt the text encoder (stage 2)",
    "caption": "train a ClipCap or IFCap captioner through gen, caption real images",
    "vlm": "train LLaVA or a projector to an LLM through gen, ask about real images",
    "evaluate": "score a model on benchmarks by name",
    "embed": "embed a folder of images or a data set column with one branch",
    "demo": "generate, align and measure on the bundled digits, in minutes",
}
LISTED = "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
# Commands that continue an interrupted run.
RESUMED = ("generate", "push", "evaluate", "embed")
USAGE = f"""usage: gmail-hf COMMAND [--OPTION VALUE ...]

GMAIL (Mo & Yun, ICML 2025): train vision-language models on generated images.

commands:
{LISTED}

options:
  --help     show this text; gmail-hf COMMAND --help lists a command's options
  --version  show the version
  --debug    with a command: show the traceback of an error

generate, train, caption, vlm on several GPUs:
  accelerate launch -m gmail_hf.commands.COMMAND [--OPTION VALUE ...]"""
# Libraries whose errors usually concern the user's input or network: files, Hub ids, configurations.
READERS = (
    "datasets", "httpx", "httpx2", "huggingface_hub", "pyarrow", "PIL", "safetensors", "safetensors_rust", "yaml",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """
    The entry point `gmail-hf`. Only the chosen command is imported.

    Raises:
        SystemExit: code 2 after a user's mistake, 130 after Ctrl-C.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
    elif name == "--version":
        print(f"gmail-hf {__version__}")
    elif name in COMMANDS:
        run(name, rest)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        _fail(f"unknown command '{name}'; " + (f"did you mean {near[0]}?" if near else "see gmail-hf --help"))


def run(command: str | Callable[[list[str]], Any], argv: Sequence[str] | None = None) -> None:
    """
    Run a command. The scripts in examples/ call this function.

    Args:
        command: a key of `COMMANDS`, or a function of a command line.
        argv: the command line. Defaults to that of this process.

    Raises:
        SystemExit: see [`main`].
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gmail_hf").setLevel(logging.INFO)
    # With a value, --debug is the option of transformers.TrainingArguments.
    own = [i for i, word in enumerate(argv) if word == "--debug" and [*argv, "--"][i + 1].startswith("--")]
    argv = [word for i, word in enumerate(argv) if i not in own]
    try:
        main = command if callable(command) else importlib.import_module(f"gmail_hf.commands.{command}").main
        main(argv)
    except KeyboardInterrupt as interrupt:
        how = str(interrupt) or f"Run the same command to {'continue' if command in RESUMED else 'start again'}."
        print(f"\ngmail-hf: interrupted. {how}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if own or not _is_mistake(error):
            raise
        _fail(" ".join(_text(error).split()))


def _is_mistake(error: Exception) -> bool:
    """Whether an error concerns the user's input rather than a bug."""
    kinds = (ValueError, OSError, ImportError)
    return isinstance(error, kinds) or type(error).__module__.partition(".")[0] in READERS


def _text(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":  # a file name is the only such input
        return f"{ascii(error.object)} is not valid UTF-8: rename the file."
    return str(error)


def _fail(message: str) -> None:
    print(f"gmail-hf: error: {message}", file=sys.stderr)
    raise SystemExit(2) from None


if __name__ == "__main__":
    main()
