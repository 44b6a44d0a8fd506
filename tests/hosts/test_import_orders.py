"""Whatever is imported first, PEFT knows MOE_LORA and TRL knows `--peft_type`, without a warning of ours."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from subprocess import CompletedProcess

import pytest

from tests.hosts.processes import run_python

FIRST_IMPORTS = [
    "import torch",
    "import accelerate",
    "from transformers import AutoModelForCausalLM",
    "import peft",
    "from peft import LoraConfig, get_peft_model",
    "from peft.utils.peft_types import PeftType",
    "import trl",
    "from trl import SFTTrainer",
    "from trl import TrlParser, ModelConfig, ScriptArguments, get_peft_config",
    "from trl.scripts.utils import TrlParser",
    "from trl.trainer.utils import get_peft_config",
    "import trl.scripts.sft",
    "from trl_moe_ext import MoeLoraConfig",
    "from trl_moe_ext import MoeEsftConfig",
    # Of both tuners; while it is half there, neither can be imported.
    "import trl_moe_ext.tuners.targets.resolve",
]

# `early` holds what the first import has bound: names that were looked up before anything else could be patched.
CHECKS = """
early = dict(globals())
import peft, peft.mapping, trl, trl.trainer, trl.trainer.utils, trl.scripts, trl.scripts.utils
from peft.utils.peft_types import PeftType

assert PeftType("MOE_LORA") is PeftType.MOE_LORA is early.get("PeftType", PeftType).MOE_LORA
assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["MOE_LORA"].__name__ == "MoeLoraModel"
assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["MOE_LORA"] == "lora_"
assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["MOE_ESFT"].__name__ == "MoeEsftModel"

parsers = [trl.TrlParser, trl.scripts.TrlParser, trl.scripts.utils.TrlParser]
for parser in [early.get("TrlParser", trl.TrlParser), *parsers]:
    arguments = ["--peft_type", "moe_lora", "--moe_expert_r", "3"]
    (parsed,) = parser((trl.ModelConfig,)).parse_args_and_config(arguments)
    assert parsed.use_peft and parsed.moe_expert_r == 3

places = [trl.get_peft_config, trl.trainer.get_peft_config, trl.trainer.utils.get_peft_config]
for get_peft_config in [early.get("get_peft_config", trl.get_peft_config), *places]:
    config = get_peft_config(parsed)
    assert type(config).__name__ == "MoeLoraConfig" and config.expert_r == 3, config
    assert type(get_peft_config(trl.ModelConfig(use_peft=True))) is peft.LoraConfig
    assert get_peft_config(trl.ModelConfig()) is None
assert type(peft.__loader__).__name__ == type(trl.trainer.utils.__loader__).__name__ == "SourceFileLoader"
assert type(peft.__spec__).__name__ == type(trl.trainer.utils.__spec__).__name__ == "ModuleSpec"
"""


OPT_OUTS = [{"TRL_MOE_EXT_DISABLE": "1"}, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}]

# Off, and then switched on by hand after everything was imported and `trl` has cached what it was asked for.
OFF_CHECKS = """
import os, sys
import torch, peft, trl, trl.trainer
from trl import TrlParser, ModelConfig, get_peft_config
from trl.trainer import get_peft_config
assert not {"MOE_LORA", "MOE_ESFT"} & peft.PeftType.__members__.keys()
assert type(TrlParser((ModelConfig,))) is TrlParser
assert not hasattr(get_peft_config, "__wrapped__")
assert not any(name.startswith("trl_moe_ext.hosts") for name in sys.modules)

os.environ.pop("TRL_MOE_EXT_DISABLE", None)
from trl_moe_ext._autoload import autoload
autoload()
(parsed,) = TrlParser((ModelConfig,)).parse_args_and_config(["--peft_type", "moe_lora"])
for place in (trl, trl.trainer, trl.trainer.utils):
    assert place.get_peft_config(parsed).peft_type is peft.PeftType.MOE_LORA, place
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[CompletedProcess[str]]]]:
    """Every process of this file, two at a time: each imports trl, which takes seconds."""
    cwd = tmp_path_factory.mktemp("orders")
    pool = ThreadPoolExecutor(max_workers=2)
    running = {first: pool.submit(run_python, f"{first}\n{CHECKS}", cwd) for first in FIRST_IMPORTS}
    running |= {str(env): pool.submit(run_python, OFF_CHECKS, cwd, env) for env in OPT_OUTS}
    yield running
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("first_import", FIRST_IMPORTS)
def test_first_import(first_import: str, processes: dict[str, Future[CompletedProcess[str]]]) -> None:
    assert "trl_moe_ext leaves" not in processes[first_import].result().stderr


@pytest.mark.parametrize("env", OPT_OUTS, ids=str)
def test_opt_out(env: dict[str, str], processes: dict[str, Future[CompletedProcess[str]]]) -> None:
    processes[str(env)].result()
