"""What models write, side by side: ten prompts, always the likeliest token, unedited, as a Markdown table.

.venv/bin/python benchmarks/samples.py MODEL PACKED ... --tokens 40
"""

import argparse

from ptq161.generation import Sampling, stream
from ptq161.sources import open_model

PROMPTS = (
    "The capital of France is",
    "The tower was built in",
    "In 1969, the first people",
    "Photosynthesis is the process by which",
    "The band released their second album",
    "During the Second World War, the",
    "The species is found in",
    "A good way to learn a language is to",
    "She opened the door and",
    "The most important thing about science is",
)


def main() -> None:
    """Print one row for every prompt and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    written = []
    for path in args.models:
        model, tokenizer = open_model(path)
        sampling = Sampling(max_new_tokens=args.tokens)
        written.append([stream(model, tokenizer, tokenizer(p)["input_ids"], sampling)["text"] for p in PROMPTS])
    print("| prompt | " + " | ".join(args.models) + " |\n|" + "---|" * (len(args.models) + 1))
    for prompt, *texts in zip(PROMPTS, *written, strict=True):
        cells = [repr(text)[1:-1].replace("|", "\\|").replace("`", "'") for text in texts]
        print(f"| {prompt} | " + " | ".join(f"`{cell}`" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
