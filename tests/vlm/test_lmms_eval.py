"""lmms-eval on a merged export: what it writes is what the branch writes here. Needs lmms-eval, see the guide."""

import json
import subprocess
import sys

import pytest
from benchmark_data import save_gmail, save_llava
from datasets import Dataset
from tiny import picture
from transformers import AutoProcessor

from gmail_hf.evaluation.answering import write
from gmail_hf.vlm import GmailLlavaForConditionalGeneration

pytest.importorskip("lmms_eval")
TASK = """\
task: questions
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def test_the_merged_branch_answers_as_the_branch(tmp_path):
    folder = save_llava(tmp_path / "llava", save_gmail(tmp_path / "gmail"))
    model, processor = (
        GmailLlavaForConditionalGeneration.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    images = [picture(seed) for seed in range(4)]
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    conversations = [[{"role": "user", "content": content}]] * 4

    def answers(branch):
        options = {"max_new_tokens": 12, "do_sample": False}
        return write(model.eval(), processor, [[image] for image in images], conversations, branch, **options)

    expected = answers("gen")
    assert expected != answers("real")
    served = tmp_path / "served"
    model.to_llava("gen").save_pretrained(served)
    processor.save_pretrained(served)
    rows = [
        {"image": image, "question": content[1]["text"], "answer": right}
        for image, right in zip(images, [*expected[:3], "another"], strict=True)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "questions.parquet")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "questions.yaml").write_text(TASK.format(file=tmp_path / "questions.parquet"))
    (tasks / "utils.py").write_text('def images(doc):\n    return [doc["image"].convert("RGB")]\n')
    arguments = f"pretrained={served},device=cpu,device_map=cpu,dtype=float32"
    command = ["--model", "llava_hf", "--model_args", arguments, "--tasks", "questions", "--include_path", str(tasks)]
    command += ["--batch_size", "1", "--log_samples", "--output_path", str(tmp_path / "scores")]
    subprocess.run([sys.executable, "-m", "lmms_eval", *command], check=True, cwd=tmp_path)
    (samples,) = (tmp_path / "scores").rglob("*samples_questions.jsonl")
    written = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["filtered_resps"].strip() for line in written] == expected
    (result,) = (tmp_path / "scores").rglob("*results.json")
    assert json.loads(result.read_text())["results"]["questions"]["exact_match,none"] == 3 / 4
