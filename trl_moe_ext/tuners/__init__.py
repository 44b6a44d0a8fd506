"""PEFT tuner types for routed experts, one package each."""
