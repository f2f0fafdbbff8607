"""A folder of small task files, one line or a few for each kind of task that is known offline."""

import json

ROWS = {
    "piqa_valid.jsonl": [
        {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Hit the floor.", "label": 0},
        {"goal": "Warm some soup", "sol1": "Freeze it.", "sol2": "Put it on the stove.", "label": 1},
        {"goal": "Dry a shirt", "sol1": "Hang it in the sun.", "sol2": "Put it into the rain, and wait.", "label": 0},
        {"goal": "Cut bread", "sol1": "Use a spoon for it.", "sol2": "Use a knife.", "label": 1},
    ],
    "arc_easy_test.jsonl": [
        {"question": "What falls?", "choices": ["rain", "smoke", "light"], "label": 0},
        {"question": "What burns?", "choices": ["sand", "water", "salt", "iron", "wood"], "label": 4},
    ],
    "winogrande_xl_dev.jsonl": [
        {"sentence": "The cup fell as the _ was narrow.", "option1": "cup", "option2": "shelf", "label": 1}
    ],
    "hellaswag_val.jsonl": [
        {"query": "Cooking: A man cuts an onion. he", "endings": ["cries.", "flies.", "swims.", "sleeps."], "label": 0}
    ],
    "race_high_test.jsonl": [
        {"article": "Ann has a dog.", "question": "Who has?", "options": ["Ann", "Bob", "Cy", "Di"], "label": 0},
        {"article": "Ann has a dog.", "question": "It is a  _  .", "options": ["cat", "dog", "cow", "hen"], "label": 1},
        {"article": "It rains.", "question": "What is it?", "options": ["snow", "shine", "rain", "end"], "label": 2},
    ],
    "lambada_test_openai.jsonl": [{"text": "He took the key and opened the door"}, {"text": "She read the letter"}],
    "mmlu_test.jsonl": [
        {"subject": "anatomy", "question": "Where is a heart?", "choices": ["chest", "arm", "leg", "ear"], "label": 0},
        {"subject": "virology", "question": "What is a virus?", "choices": ["a", "b", "c", "d"], "label": 3},
    ],
    "mmlu_dev.jsonl": [
        {"subject": "anatomy", "question": "Where is the knee?", "choices": ["chest", "arm", "leg", "ear"], "label": 2}
    ],
    "gsm8k_test.jsonl": [{"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}],
    "longbench_multi_news.jsonl": [{"input": "", "context": "Passage 1:\nIt rained.", "answers": ["It rained."]}],
}  # fmt: skip


def write_task_files(folder):
    """Write them all, and return the folder."""
    for name, rows in ROWS.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
