"""Speed and memory of expert LoRA beside the frozen model and stock PEFT, in one run on the machine at hand."""
