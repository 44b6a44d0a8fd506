"""`trl-moe ask`: the same question to the base model and to the adapter, so that what training changed is seen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trl_moe_ext.cli.load_adapter import base_model_of, load_adapter
from trl_moe_ext.errors import ConfigError


def ask(
    adapter: Annotated[Path, typer.Argument(help="Directory of an adapter: the output_dir of a training run.")],
    question: Annotated[
        str | None, typer.Argument(help="Without it, each line of the standard input is a question.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Above 0, tokens are drawn at random, with the same seed for both.")
    ] = 0.0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the base model; auto: as it is saved."),
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1; all GPUs, or the CPU, if not given.")
    ] = None,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Print the adapter's answer alone.")] = False,
) -> None:
    """Show how the base model and the adapter answer a question."""
    if question is not None and not question.strip():
        raise ConfigError("the question is empty; leave it out to ask from the standard input")
    model, tokenizer = load_adapter(adapter, base_model_of(adapter), dtype, device)
    if not tokenizer.chat_template:
        typer.echo("The tokenizer has no chat template: the question is completed as plain text.", err=True)
    generation = _generation(model, tokenizer, max_new_tokens, temperature)
    for text in _questions(echo=not adapter_only) if question is None else [question]:
        if not adapter_only:
            with model.disable_adapter():
                _show("Base model", _answer(model, tokenizer, text, generation))
            typer.echo()
        _show(None if adapter_only else "Adapter", _answer(model, tokenizer, text, generation))
        if question is None and not adapter_only:
            typer.echo()


def _show(heading: str | None, answer: str) -> None:
    if heading is not None:
        typer.secho(f"{heading}:", bold=True)
    typer.echo(answer)


def _questions(echo: bool) -> Iterator[str]:
    """Lines of the standard input up to its end. Those that nobody typed are repeated, if `echo`, as if they were."""
    typed = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            if typed:
                typer.echo()
            return
        if line:
            if echo and not typed:
                typer.echo(f"> {line}")
            yield line


def _generation(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Options of `generate`. An answer ends with the tokenizer's end, as TRL trains it, or with the model's."""
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    # A generation config may hold sampling options, which are reported as mistakes when nothing is sampled.
    sampling = {"temperature": temperature} if temperature else dict.fromkeys(("temperature", "top_p", "top_k"))
    return {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": sorted(ends) or None,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "do_sample": temperature > 0,
        **sampling,
    }


def _answer(model: Any, tokenizer: Any, question: str, generation: dict[str, Any]) -> str:
    import torch

    if tokenizer.chat_template:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        inputs = tokenizer(question, return_tensors="pt")
    prompt = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    torch.manual_seed(0)
    output = model.generate(**prompt, **generation)
    answer: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()
