"""Commands that let a model write: generate, chat, serve."""

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from ptq161.commands.common import opened_model, require, show_result

if TYPE_CHECKING:
    from ptq161.generation import Sampling


def generate_command(args: Namespace) -> int:
    """Continue a prompt."""
    from ptq161 import dialogue, generation, terminal

    sampling = _sampling(args)
    with terminal.quiet_libraries(debug=args.debug):
        model, tokenizer = opened_model(args)
        prompt = tokenizer(args.prompt)["input_ids"]
        result = generation.stream(model, tokenizer, prompt, sampling, on_text=dialogue.writer(silent=args.json))
    del result["ids"]
    dialogue.show_written(result, text=not args.json, figures=not args.json and not args.quiet)
    return show_result(args, {"model": args.path, "prompt": args.prompt, **result}, lambda out: None)


def chat_command(args: Namespace) -> int:
    """Talk until the input ends."""
    from ptq161 import chat, dialogue, terminal

    sampling = _sampling(args)
    with terminal.quiet_libraries(debug=args.debug):
        model, tokenizer = opened_model(args)
        conversation = chat.Conversation(model, tokenizer, sampling, args.system)
        answers = chat.converse(
            conversation,
            read=dialogue.reader("> ", hint=None if args.quiet else chat.HINT, silent=args.json),
            on_text=dialogue.writer(silent=args.json),
            on_answer=lambda answer: dialogue.show_written(answer, text=not args.json, figures=not args.quiet),
            note=lambda text: print(text, file=sys.stderr),
        )
    return show_result(args, {"model": args.path, "system": args.system, "answers": answers}, lambda out: None)


def serve_command(args: Namespace) -> int:
    """Answer OpenAI clients until interrupted."""
    require("serve", "fastapi", "openai", "uvicorn")
    from ptq161 import serve, terminal
    from ptq161.handlers import Served

    with terminal.quiet_libraries(debug=args.debug), serve.listen(args.host, args.port) as listener:
        model, tokenizer = opened_model(args)
        served = Served(args.name or serve.name_of(args.path), model, tokenizer)
        url = serve.url_of(listener)
        show_result(args, {"model": served.name, "url": url}, lambda out: out.print(f"{served.name} answers at {url}"))
        sys.stdout.flush()
        serve.run(served, listener, access_log=not args.quiet)
    return 0


def _sampling(args: Namespace) -> "Sampling":
    from ptq161.generation import Sampling

    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
