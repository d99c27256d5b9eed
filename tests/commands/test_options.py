"""Options from YAML files and the command line, and the spellings of the first releases."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gmail_hf.commands import generate, push, train
from gmail_hf.commands.options import OLD_SPELLINGS, bundled_configs, parse


@dataclass
class Arguments:
    model: str
    number: int = 3
    rate: float = 0.5
    switch: bool = False
    names: list[str] = field(default_factory=list)
    kwargs: dict | str | None = None
    dataset: str | None = None
    stage: str = "first"


def parsed(*argv, **options) -> Arguments:
    (arguments,) = parse(argv, "test", None, (Arguments,), **options)
    return arguments


def written(tmp_path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_a_yaml_value_means_what_the_flag_means(tmp_path):
    config = "model: org/clip\nnumber: 7\nrate: 1e-3\nswitch: true\nnames: [a, b]\nkwargs: {x: 1}\ndataset: null\n"
    from_file = parsed("--config", written(tmp_path, config))
    flags = ["--model=org/clip", "--number", "7", "--rate", "1e-3", "--switch", "--names", "a", "b", "--kwargs"]
    assert from_file == parsed(*flags, '{"x": 1}')
    assert (from_file.rate, from_file.switch, from_file.names, from_file.dataset) == (1e-3, True, ["a", "b"], None)
    assert parsed("--config", written(tmp_path, "model: m\nswitch: 'no'\n")).switch is False
    assert parsed("--config", written(tmp_path, "model: m\nnames: a\n")).names == ["a"]


def test_lists_and_mappings_of_transformers_arguments(tmp_path):
    config = "output_dir: out\nreport_to: [tensorboard]\nlr_scheduler_kwargs: {num_cycles: 3}\nuse_cpu: true\n"
    _, _, args = train.parse_args(["--config", written(tmp_path, config)])
    assert args.report_to == ["tensorboard"] and args.lr_scheduler_kwargs == {"num_cycles": 3}
    _, _, args = train.parse_args(["--config", written(tmp_path, config), "--report_to", "none"])
    assert args.report_to == []


def test_the_command_line_wins(tmp_path):
    config = written(tmp_path, "model: org/clip\nnumber: 7\nnames: [a, b]\n")
    arguments = parsed("--config", config, "--number=9", "--names", "c")
    assert (arguments.model, arguments.number, arguments.names) == ("org/clip", 9, ["c"])


def test_a_repeated_option_loses_no_value():
    with pytest.raises(ValueError, match="--names is given more than once; list all values after one --names"):
        parsed("--model", "m", "--names", "a", "--names=b")
    assert parsed("--model", "m", "--number", "1", "--number", "2").number == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nnumbr: 7\n", "has the unknown option 'numbr'; did you mean --number"),
        ("model: m\nnumber: seven\n", "invalid int value: 'seven'"),
        ("model: m\nnumber: 7.5\n", "invalid int value: '7.5'"),
        ("model: m\nswitch: perhaps\n", "Truthy value expected"),
        ("model: m\nconfig: other.yaml\n", "has the unknown option 'config'"),
        ("- model\n", "has no 'option: value' lines"),
        ("number: 7\n", "required: --model"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parsed("--config", written(tmp_path, text))


def test_an_unexpected_word_and_a_cut_flag_are_refused():
    with pytest.raises(ValueError, match="unexpected argument 'word'"):
        parsed("word", "--model", "m")
    with pytest.raises(ValueError, match="unknown option --numb; did you mean --number"):
        parsed("--model", "m", "--numb", "3")


def test_dashes_are_underscores():
    assert parsed("--model", "m", "--dataset-name", "d").dataset == "d"


@pytest.mark.parametrize("flag", ["--model_name_or_path=old", "--gmail-name-or-path=old"])
def test_old_spellings_warn_and_work(flag, caplog):
    assert parsed(flag).model == "old"
    old = flag.partition("=")[0].removeprefix("--").replace("-", "_")
    assert f"--{old} is now called --model; the old name will be removed" in caplog.text


def test_old_spellings_in_a_file(tmp_path, caplog):
    arguments = parsed("--config", written(tmp_path, "model_name_or_path: m\ndataset_name: d\n"))
    assert (arguments.model, arguments.dataset) == ("m", "d") and len(caplog.records) == 2
    # The flag that replaces one wins over it.
    assert parsed("--config", written(tmp_path, "model_name_or_path: m\n"), "--model", "n").model == "n"


def test_todays_spellings_do_not_warn(caplog):
    parsed("--model", "m", "--dataset", "d")
    assert not caplog.records and not set(OLD_SPELLINGS) & set(OLD_SPELLINGS.values())


def test_spellings_of_the_readme_of_the_first_releases(tmp_path, caplog):
    argv = ["--dataset_name", "org/pairs", "--model_name_or_path", "org/clip", "--train_split", "part"]
    model, data, _ = train.parse_args([*argv, "--dataset_config_name=c", "--output_dir", str(tmp_path)])
    assert (model.model, data.dataset, data.split, data.dataset_config) == ("org/clip", "org/pairs", "part", "c")
    assert len(caplog.records) == 4


def test_the_bundled_config_is_used_without_a_data_set():
    config = {"default_config": "digits_text"}
    with pytest.raises(ValueError, match="digits_text has the unknown option 'eval_split'"):
        parsed("--model", "m", **config)
    assert parsed("--model", "m", "--dataset", "d", **config).dataset == "d"
    assert parsed("--model", "m", "--dataset_name", "d", **config).dataset == "d"


def test_bundled_configs_go_by_name_and_by_their_old_path(caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundled_configs() == ["clipcap_digits", "digits", "digits_text", "ifcap_digits", "llava_digits"]
    by_name = train.parse_args(["--config", "digits_text"])
    assert by_name[0].stage == "text" and not caplog.records
    assert train.parse_args(["--config", "examples/configs/digits_text.yaml"])[0] == by_name[0]
    assert "use --config digits_text" in caplog.text
    with pytest.raises(FileNotFoundError):
        train.parse_args(["--config", "mine/digits_text.yaml"])
    Path("digits_text.yaml").write_text("stage: joint\noutput_dir: out\n")
    assert train.parse_args(["--config", "digits_text.yaml"])[0].stage == "joint"


def test_a_config_that_does_not_exist_names_the_bundled_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="coco.yaml' does not exist.*digits_text.*repository"):
        parsed("--config", "examples/configs/coco.yaml")


STAGES = {"first": {}, "second": {"number": 5}}


def test_a_stage_sets_defaults(tmp_path):
    assert parsed("--model", "m", stages=STAGES).number == 3
    assert parsed("--model", "m", "--stage", "second", stages=STAGES).number == 5
    assert parsed("--model", "m", "--stage=second", "--number", "6", stages=STAGES).number == 6
    config = written(tmp_path, "model: m\nstage: second\n")
    assert parsed("--config", config, stages=STAGES).number == 5
    assert parsed("--config", config, "--stage", "first", stages=STAGES).number == 3


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = written(tmp_path, "model: ~/clip\nnames: [a]\n")
    arguments = parsed("--config", config, "--dataset=~/pairs")
    assert (arguments.model, arguments.dataset) == ("/home/me/clip", "/home/me/pairs")


def test_a_new_repository_has_the_default_of_its_organisation(monkeypatch):
    asked = []
    monkeypatch.setattr("gmail_hf.generation.push_dataset", lambda folder, repo, private, more: asked.append(private))
    push.main(["out", "org/pairs"])
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, private, **more: asked.append(private))
    monkeypatch.setattr("gmail_hf.commands.bundled.synthesize", lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generate.main(["--dataset", "digits", "--output_dir", "out", "--push_to_hub"])
    assert asked == [None, None]


@pytest.mark.parametrize("flag", ["--hub_private_repo", "--hub-private-repo", "--private"])
def test_push_takes_the_old_flag_too(flag, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("gmail_hf.generation.push_dataset", lambda *args: calls.append(args) or "the Hub")
    push.main(["out", "org/pairs", flag, "--captions_license", "mit"])
    assert calls == [("out", "org/pairs", True, "mit")] and capsys.readouterr().out == "The shards are at the Hub.\n"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], (False, "out")),
        (["--push_to_hub"], (True, "out")),
        (["--push_to_hub", "--hub_dataset_id", "org/pairs"], (True, "org/pairs")),
        (["--push_to_hub", "true", "--hub_dataset_id", "org/pairs"], (True, "org/pairs")),
        (["--push_to_hub", "false"], (False, "out")),
        (["--push_to_hub", "org/old"], (True, "org/old")),
    ],
)
def test_generate_pushes_where_it_is_told(argv, expected, caplog):
    (hub,) = parse(argv, "generate", None, (generate.HubArguments,))
    assert generate._push_options(hub, "somewhere/out") == expected
    assert bool(caplog.records) == ("org/old" in argv)
